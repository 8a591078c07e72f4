"""The observer "entropy": the range that changes the distribution of the values least."""

from __future__ import annotations

import torch

from ... import ops
from ..histogram import HistogramObserver
from ..observer import Purpose, register_observer

_MOST_SATURATED = 0.01  # share of values: where next to nothing is left unsaturated, the rest of it may fit by chance


@register_observer
class Entropy(HistogramObserver):
    """The range whose scale gives the least Kullback-Leibler divergence of the values' distribution after rounding.

    As calibrators for int8 have it: what saturates is counted with the largest value that does not, and before that,
    what shares an FP8 value is spread evenly over its bins. Zeros stay zeros and are left out. One value in a hundred
    saturates at most. It depends on the number format and on how scales follow from ranges; without them it is max|x|.
    """

    name = "entropy"

    def range_for(self, purpose: Purpose) -> torch.Tensor:
        if not self.tells_more():
            return self.range()
        bins, counts = self.filled()
        ranges, scales = self.candidates(purpose)
        values = self.values_of(bins)
        middles, widths = values[:, 4], torch.exp2((bins // 16).double())
        fits = middles <= purpose.fmt.full_scale * scales[:, None]
        middles = middles.expand(len(scales), -1)
        codes = ops.cast_to_fp8(middles, scales[:, None], purpose.fmt.dtype, purpose.fmt.full_scale)
        groups = codes.view(torch.uint8).long()
        inside, spread = counts * fits, widths * fits
        of_group = [torch.zeros(len(scales), 256).double().scatter_add_(1, groups, each) for each in (inside, spread)]
        mass, width = (each.gather(1, groups) for each in of_group)
        rounded = torch.where(fits, mass * spread / width, 0)
        last = fits.sum(1, keepdim=True) - 1
        saturated = counts.sum() - inside.sum(1, keepdim=True)
        clipped = inside.scatter_add(1, last.clamp(min=0), saturated)
        p, q = clipped / counts.sum(), rounded / rounded.sum(1, keepdim=True)
        divergence = torch.where(clipped > 0, p * (p / q).log(), 0).sum(1)
        too_many = saturated[:, 0] > _MOST_SATURATED * counts.sum()
        return self.least(torch.where(too_many, torch.inf, divergence), ranges)
