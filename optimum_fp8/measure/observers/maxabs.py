"""The observer "maxabs": the largest magnitude of a tensor, and of each head where it has heads."""

from __future__ import annotations

import torch

from ... import ops
from ..observer import Observer, Statistic, register_observer


@register_observer
class MaxAbs(Observer):
    """max|x| over everything seen.

    Statistics:
        maxabs: float32 scalar, max|x|.
        count: int64 scalar, how many values were seen.
        maxabs_per_head: float32 `(heads,)`, for what attention takes.
    """

    name = "maxabs"
    STATISTICS = {
        "maxabs": Statistic(torch.maximum),
        "count": Statistic(torch.add),
        "maxabs_per_head": Statistic(torch.maximum, per_head=True),
    }

    @classmethod
    def from_range(cls, maxabs: torch.Tensor, count: int) -> Observer | None:
        return cls(maxabs=maxabs.amax().float(), count=torch.tensor(count, dtype=torch.int64, device=maxabs.device))

    def update(self, x: torch.Tensor) -> None:
        self.accumulate(maxabs=ops.maxabs(x).reshape(()), count=count_of(x))

    def update_per_head(self, x: torch.Tensor) -> None:
        per_head = x.abs().amax(dim=(0, 2)).float()
        self.accumulate(maxabs=per_head.amax(), count=count_of(x), maxabs_per_head=per_head)

    def range(self) -> torch.Tensor:
        return self._statistics["maxabs"]

    def range_per_head(self) -> torch.Tensor | None:
        return self._statistics.get("maxabs_per_head")


def count_of(x: torch.Tensor) -> torch.Tensor:
    """How many values a tensor has, int64 scalar on its device."""
    return torch.tensor(x.numel(), dtype=torch.int64, device=x.device)
