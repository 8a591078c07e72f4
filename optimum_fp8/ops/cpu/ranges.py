"""The scales that ranges give, and a table of those of all ranges in bfloat16, in which the library looks them up."""

from __future__ import annotations

from functools import cache

import torch

from ...formats import number_format
from ...rounding import scale_from_maxabs


def scale_of_ranges(
    maxabs: torch.Tensor,
    per_tensor: bool,
    divisor: float,
    rounding: str,
    fp8_config: str,
    target: str,
    hp_dtype: torch.dtype,
) -> torch.Tensor:
    fmt = number_format(fp8_config, target)
    return scale_from_maxabs(maxabs, divisor, rounding, fmt, hp_dtype, reciprocal=fmt.is_gaudi and per_tensor)


@cache
def scale_of_range(per_tensor: bool, divisor: float, rounding: str, fp8_config: str, target: str) -> torch.Tensor:
    """The scale of every bfloat16 range, by its bits, float32 `[32768]`: looking it up is quicker than rounding it."""
    ranges = torch.arange(1 << 15, dtype=torch.int16, device="cpu").view(torch.bfloat16)
    return scale_of_ranges(ranges, per_tensor, divisor, rounding, fp8_config, target, torch.bfloat16)
