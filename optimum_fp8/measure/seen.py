"""Seen: which tensors were observed a moment ago, so that modules that share one observe it once."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.weak import WeakIdKeyDictionary

from .observer import Observer


class Seen:
    """What was observed of tensors that still live.

    Query, key and value projections are given one tensor, gates and up projections another. It is known again by its
    identity and its version, which every change in place raises (all but those through `.data`). Tensors are not kept
    alive. Copies, of a model with its observers, begin with nothing.
    """

    def __init__(self) -> None:
        self._known: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def __deepcopy__(self, memo: dict[int, Any]) -> Seen:
        return Seen()

    def __reduce__(self) -> Any:
        return Seen, ()

    def find(self, x: torch.Tensor, way: tuple[Any, ...]) -> Observer | None:
        """What was observed of this very tensor, unchanged since and looked at in the same way; None if nothing was."""
        if x.is_inference():  # has no version
            return None
        found = self._known.get(x)
        return found[1] if found is not None and found[0] == (x._version, *way) else None

    def keep(self, x: torch.Tensor, way: tuple[Any, ...], observer: Observer) -> None:
        """Remember what was observed of a tensor."""
        if not x.is_inference() and not observer.not_mergeable:
            self._known[x] = ((x._version, *way), observer)
