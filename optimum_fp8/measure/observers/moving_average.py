"""The observer "moving_average": an exponential moving average of the batches' largest magnitudes."""

from __future__ import annotations

import torch

from ... import ops
from ..observer import Observer, Statistic, register_observer
from .maxabs import MaxAbs, count_of

_NEWEST = 0.1  # part that the newest batch has in the average


def _later(earlier: torch.Tensor, later: torch.Tensor) -> torch.Tensor:
    return later


@register_observer
class MovingAverage(MaxAbs):
    """The average of max|x| over batches, in which each batch counts nine tenths of the next.

    It depends on the order and on the size of the batches: the same data in another order gives another range. Two of
    them cannot be merged, as nothing tells which data came first.

    Statistics:
        moving_average: float32 scalar; the others as those of `MaxAbs`.
    """

    name = "moving_average"
    STATISTICS = {**MaxAbs.STATISTICS, "moving_average": Statistic(_later)}
    not_mergeable = (
        "a moving average depends on the order of the data, which two of them do not tell; measure all data in one "
        "run, or with another observer ('maxabs', 'percentile', 'mse', 'entropy')"
    )

    @classmethod
    def from_range(cls, maxabs: torch.Tensor, count: int) -> Observer | None:
        largest = maxabs.amax().float()
        return cls(maxabs=largest, count=torch.tensor(count, device=largest.device), moving_average=largest)

    def update(self, x: torch.Tensor) -> None:
        largest = ops.maxabs(x).reshape(())
        self.accumulate(maxabs=largest, count=count_of(x), moving_average=self._average(largest))

    def update_per_head(self, x: torch.Tensor) -> None:
        per_head = x.abs().amax(dim=(0, 2)).float()
        largest = per_head.amax()
        self.accumulate(
            maxabs=largest, count=count_of(x), maxabs_per_head=per_head, moving_average=self._average(largest)
        )

    def range(self) -> torch.Tensor:
        return self._statistics["moving_average"]

    def _average(self, largest: torch.Tensor) -> torch.Tensor:
        known = self._statistics.get("moving_average")
        return largest if known is None else torch.lerp(known.to(largest.device), largest, _NEWEST)
