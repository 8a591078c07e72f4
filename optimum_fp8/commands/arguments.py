"""What `optimum-cli fp8 …` says of arguments that are wrong: one line, without argparse's list of all flags.

`optimum-cli` reads this file at every start: nothing here may import torch.
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from typing import Any, NoReturn

from ..errors import nearest


def explain_errors(parser: ArgumentParser) -> None:
    """Have a parser name the nearest flag for one it does not know, and keep its errors to one line."""
    parse = parser.parse_known_args

    def error(message: str) -> NoReturn:
        parser.exit(2, f"error: {message} ({parser.prog} --help explains all flags)\n")

    def parse_known_args(args: Sequence[str] | None = None, namespace: Any = None) -> tuple[Namespace, list[str]]:
        given = sys.argv[1:] if args is None else list(args)
        flags = [flag for action in parser._actions for flag in action.option_strings if flag.startswith("--")]
        for argument in given:
            name = argument.partition("=")[0]
            if name.startswith("--") and name != "--" and not any(flag.startswith(name) for flag in flags):
                error(f"there is no flag {name}: {nearest(name, flags)}")
        return parse(given, namespace)

    parser.error = error  # type: ignore[method-assign]
    parser.parse_known_args = parse_known_args  # type: ignore[method-assign, assignment]
