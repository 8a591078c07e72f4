"""What was found out about a tensor, kept on it until it is written to.

A tensor counts its writes, so what was known of its values before is told from what still holds. A copy counts anew,
and what it took along is not believed: nor what a pickled tensor did.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

_is_compiling = torch.compiler.is_compiling


class _Remembered(NamedTuple):
    """A value, and the version of the tensor that it was found for; None: of a copy."""

    value: Any
    version: int | None

    def __reduce__(self) -> Any:
        return _Remembered, (self.value, None)


def remember(tensor: torch.Tensor, name: str, value: Any) -> None:
    """Keep `value` on a tensor, as the attribute `name`."""
    setattr(tensor, name, _Remembered(value, _version(tensor)))


def recall(tensor: torch.Tensor, name: str) -> Any:
    """What `remember` kept; None: nothing, or the tensor was written to since, or it is a copy."""
    found = getattr(tensor, name, None)
    if found is None or found.version is None:
        return None
    return found.value if _is_compiling() or found.version == _version(tensor) else None


def recall_of_copy(tensor: torch.Tensor, name: str) -> Any:
    """What was kept on the tensor that this one was copied from, which may not hold any more; None: it is no copy."""
    found = getattr(tensor, name, None)
    return None if found is None or found.version is not None else found.value


def forget(tensor: torch.Tensor, name: str) -> None:
    """Drop what `remember` kept."""
    tensor.__dict__.pop(name, None)


def _version(tensor: torch.Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version
