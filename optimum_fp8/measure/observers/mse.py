"""The observer "mse": the range with the least mean squared error of what FP8 makes of the values."""

from __future__ import annotations

import torch

from ... import ops
from ..histogram import HistogramObserver
from ..observer import Purpose, register_observer


@register_observer
class MeanSquaredError(HistogramObserver):
    """The range whose scale rounds the values with the least mean squared error, saturation and underflow included.

    It depends on the number format and on how scales follow from ranges; without them it is max|x|.
    """

    name = "mse"

    def range_for(self, purpose: Purpose) -> torch.Tensor:
        if not self.tells_more():
            return self.range()
        bins, counts = self.filled()
        ranges, scales = self.candidates(purpose)
        values = self.values_of(bins).flatten().expand(len(scales), -1)
        codes = ops.cast_to_fp8(values, scales[:, None], purpose.fmt.dtype, purpose.fmt.full_scale)
        errors = ops.cast_from_fp8(codes, scales[:, None], torch.float32).double() - values
        return self.least(errors.square().unflatten(1, (len(bins), -1)).mean(2) @ counts, ranges)
