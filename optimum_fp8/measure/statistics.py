"""What is known of a tensor after watching it, and how two such records become one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from .. import ops

# How each statistic merges, across batches, runs and ranks alike.
REDUCTIONS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "maxabs": torch.maximum,
    "count": torch.add,
    "maxabs_per_head": torch.maximum,
}
OPTIONAL = ("maxabs_per_head",)


@dataclass
class TensorStatistics:
    """Statistics of one tensor over everything seen.

    Attributes:
        maxabs: float32 scalar, max|x|.
        count: int64 scalar, how many values were seen.
        maxabs_per_head: float32 `(heads,)`, for what attention takes; None for everything else.
    """

    maxabs: torch.Tensor
    count: torch.Tensor
    maxabs_per_head: torch.Tensor | None = None

    @classmethod
    def of(cls, x: torch.Tensor) -> TensorStatistics:
        """Statistics of one tensor (non-empty, any floating-point dtype); stays on its device, never waits for it."""
        return cls(ops.maxabs(x.detach()).reshape(()), torch.tensor(x.numel(), dtype=torch.int64, device=x.device))

    @classmethod
    def of_heads(cls, x: torch.Tensor) -> TensorStatistics:
        """Statistics of `[tokens, heads, size]` (non-empty, any floating-point dtype), per head and over all."""
        per_head = x.detach().abs().amax(dim=(0, 2)).float()
        return cls(per_head.amax(), torch.tensor(x.numel(), dtype=torch.int64, device=x.device), per_head)

    def merged(self, other: TensorStatistics) -> TensorStatistics:
        """The statistics of both together; per head only where both have as many."""
        merged = {}
        for name, reduce in REDUCTIONS.items():
            mine, others = getattr(self, name), getattr(other, name)
            if mine is not None and others is not None and mine.shape == others.shape:
                merged[name] = reduce(mine, others.to(mine.device))
        return TensorStatistics(**merged)

    def cpu(self) -> TensorStatistics:
        return TensorStatistics(**{name: value.cpu() for name, value in self.known().items()})

    def known(self) -> dict[str, torch.Tensor]:
        """The statistics that there are, by name."""
        return {name: getattr(self, name) for name in REDUCTIONS if getattr(self, name) is not None}
