"""Heads: where the heads of an operand lie, in modules that multiply themselves, so that each may have a scale."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

_COUNTS = (
    *("num_heads", "num_attention_heads", "num_attn_heads", "n_heads", "n_head", "no_heads"),
    *("num_key_value_heads", "num_kv_heads"),
)


class Heads:
    """The heads of one call of an attention module: what the module says of them, and what it is called with.

    Sizes are all that tells: a dimension is one of heads where the module has an attribute that says there are so many,
    and the dimensions before it are those of the input. Where two may be meant, none is.
    """

    def __init__(self, module: nn.Module, arguments: Iterable[Any] = ()):
        owners = (module, getattr(module, "config", None))
        found = ({getattr(owner, name, None) for name in _COUNTS} for owner in owners)
        self._counts = {count for counts in found for count in counts if isinstance(count, int)}
        given = next((x for x in arguments if isinstance(x, torch.Tensor)), None)
        self._batches = set() if given is None else {*given.shape[:2]}  # [batch, length, …] or [length, batch, …]

    def view(self, x: torch.Tensor) -> torch.Tensor | None:
        """`x` as `[batch, heads, length, size]`; None where no dimension is known to be that of heads."""
        dim, count = self._find(x)
        if dim is None:
            return None
        return x.movedim(dim, 1).flatten(2, -2) if dim else x.unflatten(0, (-1, count))

    def scale_for(self, scale: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """A static scale, `(1,)` or `(heads, 1, 1)`, as it goes with `x`: the largest where heads are not known."""
        if scale.numel() == 1:
            return scale
        dim, count = self._find(x)
        if dim is None or count != len(scale):
            return scale.amax().reshape(1)
        return scale.reshape(-1, *[1] * (x.ndim - 1 - dim)) if dim else scale.repeat(len(x) // count, 1, 1)

    def _find(self, x: torch.Tensor) -> tuple[int | None, int]:
        """The dimension of heads, and how many there are; 0: heads and batch are one dimension."""
        if x.ndim == 3:
            found = {(0, count) for count in self._counts for batch in self._batches if batch * count == len(x)}
        elif x.ndim > 3 and len(x) in self._batches:
            found = {(dim, x.shape[dim]) for dim in (1, x.ndim - 3) if x.shape[dim] in self._counts}
        else:
            found = set()
        return found.pop() if len(found) == 1 else (None, 0)
