"""The observer "maxabs_per_channel": the largest magnitude of each channel besides that of the tensor."""

from __future__ import annotations

import torch

from ..observer import Observer, Statistic, register_observer
from .maxabs import MaxAbs, count_of


@register_observer
class MaxAbsPerChannel(MaxAbs):
    """max|x| of each channel: along the last axis of inputs and outputs, the first of weights `[out, …]`.

    The range is the largest of all, as in INC: scales of activations are never per channel. Where one tensor comes in
    several sizes, only the largest magnitude of all is kept.

    Statistics:
        maxabs_per_channel: float32 `(channels,)`; the others as those of `MaxAbs`.
    """

    name = "maxabs_per_channel"
    STATISTICS = {**MaxAbs.STATISTICS, "maxabs_per_channel": Statistic(torch.maximum, (None,))}

    @classmethod
    def from_range(cls, maxabs: torch.Tensor, count: int) -> Observer | None:
        return None

    def update(self, x: torch.Tensor) -> None:
        by_channel = x.flatten(1) if self.context.kind == "weight" and x.ndim > 1 else x.reshape(-1, x.shape[-1]).t()
        per_channel = by_channel.abs().amax(dim=-1).float()
        self.accumulate(maxabs=per_channel.amax(), count=count_of(x), maxabs_per_channel=per_channel)

    def update_per_head(self, x: torch.Tensor) -> None:
        magnitudes = x.abs().amax(dim=0).float()
        per_head = magnitudes.amax(dim=1)
        self.accumulate(
            maxabs=per_head.amax(),
            count=count_of(x),
            maxabs_per_head=per_head,
            maxabs_per_channel=magnitudes.amax(dim=0),
        )
