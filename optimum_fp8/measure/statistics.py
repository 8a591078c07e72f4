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
}


@dataclass
class TensorStatistics:
    """Statistics of one tensor over everything seen.

    Attributes:
        maxabs: float32 scalar, max|x|.
        count: int64 scalar, how many values were seen.
    """

    maxabs: torch.Tensor
    count: torch.Tensor

    @classmethod
    def of(cls, x: torch.Tensor) -> TensorStatistics:
        """Statistics of one tensor (non-empty, any floating-point dtype); stays on its device, never waits for it."""
        return cls(ops.maxabs(x.detach()).reshape(()), torch.tensor(x.numel(), dtype=torch.int64, device=x.device))

    def merged(self, other: TensorStatistics) -> TensorStatistics:
        """The statistics of both together."""
        merged = {
            name: reduce(getattr(self, name), getattr(other, name).to(getattr(self, name).device))
            for name, reduce in REDUCTIONS.items()
        }
        return TensorStatistics(**merged)

    def cpu(self) -> TensorStatistics:
        return TensorStatistics(**{name: getattr(self, name).cpu() for name in REDUCTIONS})
