"""Fixtures of models that transformers saves and loads."""

from hf.conftest import *  # noqa: F403
