"""Linear modules that are given the same input one after the other (q, k and v; gate and up), computed in one go.

Who shares an input is not guessed from names: it is seen. A module that is called with the very tensor that a sibling
was just called with follows that sibling. From then on the leader computes its followers' outputs too, and each
follower hands its own out when it is called with that same, unchanged tensor; in any other case, it computes by itself.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from .linear import FP8Linear

_MOST = 8  # modules that are computed together


class SharedInput:
    """What siblings (FP8Linear modules of one parent) know of one another's inputs."""

    def __init__(self) -> None:
        self.followers: dict[FP8Linear, list[FP8Linear]] = {}
        self._outputs: dict[FP8Linear, tuple[weakref.ref[torch.Tensor], int, torch.Tensor]] = {}
        self._last: tuple[weakref.ref[torch.Tensor], int, FP8Linear] | None = None

    def group(self, leader: FP8Linear, x: torch.Tensor) -> list[FP8Linear]:
        """The modules to compute with `x` when `leader` is called with it: itself, and who followed it before."""
        if self._last is not None and _is(self._last, x):
            first = self._last[2]
            following = self.followers.setdefault(first, [])
            if (
                leader is not first
                and leader not in following
                and len(following) < _MOST - 1
                and leader.goes_with(first)
            ):
                following.append(leader)
            return [leader]
        self._last = (weakref.ref(x), x._version, leader)
        following = self.followers.get(leader, [])
        following[:] = [module for module in following if module not in self._outputs]  # whose last output was in vain
        return [leader, *following]

    def forget(self) -> None:
        """Learn anew: modules have changed, and may no longer go together."""
        self.followers.clear()
        self._outputs.clear()
        self._last = None

    def keep(self, follower: FP8Linear, x: torch.Tensor, y: torch.Tensor) -> None:
        """Have `y` ready for when `follower` is called with `x`."""
        self._outputs[follower] = (weakref.ref(x), x._version, y)

    def take(self, follower: FP8Linear, x: torch.Tensor) -> torch.Tensor | None:
        """What was kept for a call with `x`, once; None if nothing was, or if x has changed."""
        kept = self._outputs.pop(follower, None)
        if kept is None or not _is(kept, x):
            return None
        return kept[2]

    def __reduce__(self) -> tuple[type[SharedInput], tuple[()]]:
        return SharedInput, ()  # a copy learns anew


def _is(seen: tuple[weakref.ref[torch.Tensor], int, object], x: torch.Tensor) -> bool:
    return seen[0]() is x and seen[1] == x._version
