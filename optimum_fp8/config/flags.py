"""Flags for the keys of FP8Config: `optimum-cli` reads this at every start, so it may not import torch."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace, _ArgumentGroup
from collections.abc import Collection
from typing import Any

from .keys import KEYS


def add_flags(parser: ArgumentParser | _ArgumentGroup, names: Collection[str] = KEYS) -> None:
    """Give `parser` a flag for every key that can be said on a command line, or for those among `names`."""
    for each in KEYS.values():
        if each.has_flag and each.name in names:
            text = f"{each.text} ({each.values.text}; default {each.default})".replace("%", "%%")
            parser.add_argument(each.flag, default=None, help=text, **each.values.flag)


def given_flags(args: Namespace) -> dict[str, Any]:
    """The keys that were said on the command line."""
    values = {key.name: getattr(args, key.name, None) for key in KEYS.values() if key.has_flag}
    return {name: value for name, value in values.items() if value is not None}
