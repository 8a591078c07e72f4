"""HistogramObserver: what the observers that choose a range by a histogram have in common, which is all but the choice.

Bins are fixed: the upper twelve bits of the magnitude as float32, which are bfloat16's too, 8 of the exponent and 4
of the mantissa. So histograms need no range beforehand and merge by addition. An octave has 16 bins, twice the steps
that E4M3 has: where a scale is a power of two, a bin lies within what one FP8 value stands for and to one side of it,
so that the error of rounding follows from the counts. A tensor's counts take 32 KiB.
"""

from __future__ import annotations

import torch

from .. import ops
from .observer import Purpose, Statistic
from .observers.maxabs import MaxAbs, count_of

_BINS = 4096
_VALUES_PER_BIN = 8  # bfloat16 has three bits more than bins tell
_OCTAVES, _PER_OCTAVE = 16, 16


class HistogramObserver(MaxAbs):
    """max|x|, and how many values have which magnitude.

    Weights have no counts: their scales are found from the weight itself.

    Statistics:
        counts: int64 `(4096,)`, by the bins of `ops.histogram`; the others as those of `MaxAbs`, which are exact.
    """

    STATISTICS = {**MaxAbs.STATISTICS, "counts": Statistic(torch.add, (_BINS,), optional=True)}

    def update(self, x: torch.Tensor) -> None:
        if self.context.kind == "weight":
            super().update(x)
            return
        counts, maxabs = ops.histogram(x)
        self.accumulate(maxabs=maxabs.reshape(()), count=count_of(x), counts=counts)

    def update_per_head(self, x: torch.Tensor) -> None:
        per_head = x.abs().amax(dim=(0, 2)).float()
        counts, _ = ops.histogram(x)
        self.accumulate(maxabs=per_head.amax(), count=count_of(x), counts=counts, maxabs_per_head=per_head)

    def tells_more(self) -> bool:
        """Whether there is anything to choose by: counts of finite values that are not all in the first bin."""
        counts = self._statistics.get("counts")
        return counts is not None and bool(self._statistics["maxabs"].isfinite()) and bool(counts[1:].any())

    def filled(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The bins above 0 that anything is in, `(bins,)`, and how many values each holds, float64."""
        counts = self._statistics["counts"].cpu()
        bins = counts[1:].nonzero().flatten() + 1
        return bins, counts[bins].double()

    def values_of(self, bins: torch.Tensor) -> torch.Tensor:
        """The values that bins stand for, float32 `(bins, 8)`: bfloat16's, none above the largest that was seen."""
        bits = bins[:, None] * _VALUES_PER_BIN + torch.arange(_VALUES_PER_BIN, device=bins.device)
        values = bits.to(torch.int16).view(torch.bfloat16).float()
        return values.clamp(max=self._statistics["maxabs"].cpu())

    def candidates(self, purpose: Purpose) -> tuple[torch.Tensor, torch.Tensor]:
        """Ranges from max|x| downwards that lead to different scales, and the scales, float32 `(candidates,)`."""
        steps = torch.arange(_OCTAVES * _PER_OCTAVE, device="cpu")
        ranges = self._statistics["maxabs"].cpu() * torch.exp2(-steps / _PER_OCTAVE)
        scales = purpose.scale_of(ranges).expand_as(ranges)
        first = torch.ones_like(scales, dtype=torch.bool)
        first[1:] = scales[1:] != scales[:-1]
        return ranges[first], scales[first]

    def least(self, losses: torch.Tensor, ranges: torch.Tensor) -> torch.Tensor:
        """The range with the least loss; of equals the largest."""
        return ranges[losses.argmin()].to(self._statistics["maxabs"].device)
