"""What of a tensor a cast to FP8 loses: the rates of values that saturate, and of values that become zero."""

from __future__ import annotations

import torch

from ..formats import NumberFormat

_SMALLEST = {torch.float8_e4m3fn: 2.0**-9, torch.float8_e5m2: 2.0**-16}  # positive values, the subnormal ones


def lost(x: torch.Tensor, scale: torch.Tensor, fmt: NumberFormat) -> torch.Tensor:
    """How many values of a tensor a cast with a scale loses: float64 `(2,)` on its device.

    Args:
        x: any shape, floating-point.
        scale: float32, one that broadcasts with `x`: `x_q = cast(x / scale)`.
        fmt: the number format.

    Returns:
        the number of values beyond the full scale, and of those other than zero that become zero: half of the smallest
        value and below, as rounding is to even.
    """
    scaled = (x.detach().float() * (1 / scale)).abs()
    saturated = scaled > fmt.full_scale
    vanished = (scaled <= _SMALLEST[fmt.dtype] / 2) & (x.detach() != 0)
    return torch.stack([saturated.sum(), vanished.sum()]).double()
