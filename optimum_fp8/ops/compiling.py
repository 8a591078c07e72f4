"""Functions that a compiler calls once, while it traces, and whose results it takes for constants."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

_Function = TypeVar("_Function", bound=Callable[..., Any])


def constant_while_compiling(function: _Function) -> _Function:
    """Mark `function` as torch.compiler.assume_constant_result does, which would import torch's whole compiler: that
    takes seconds, at the import of this package."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
