"""Fixtures: an emulated card of each generation."""

from on_gaudi import device, gaudi2, gaudi3  # noqa: F401
