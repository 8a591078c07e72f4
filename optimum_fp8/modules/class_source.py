"""The source of a class as a syntax tree: what code does with its modules is found there, without running it."""

from __future__ import annotations

import ast
import inspect
from functools import cache
from typing import Any


@cache
def class_tree(cls: Any) -> ast.Module | None:
    """The syntax tree of a class's own source, without its bases'; None where there is no source to be had."""
    try:
        source = inspect.getsource(cls)
        # A class inside a function is indented; taking that away would fail where a text inside it is not.
        return ast.parse(f"if True:\n{source}" if source[:1].isspace() else source)
    except (OSError, TypeError, SyntaxError):
        return None
