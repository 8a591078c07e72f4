"""Ranges and dynamic scales on Gaudi.

`calculate_scale_for_cast` rounds as our per-tensor scales do, which follow what the cards gave. Everything else is
composed of plain operators, by the reference; nothing waits for a value.
"""

from __future__ import annotations

import torch

from ...formats import GAUDI_TARGETS, MAX_EXPONENT, MIN_EXPONENT
from .. import reference
from ..arguments import CastByRangeCall, DynamicScaleCall
from .bridge import offers, operator
from .casts import WIDE, quantize, refuses_full_scale

_PER_TENSOR = 1  # maxMode
_SCALE_MODES = {"identity": 0, "pow2": 1}


def dynamic_scale(call: DynamicScaleCall) -> torch.Tensor:
    if not _is_calculated(call):
        return reference.dynamic_scale(*call)
    x = call.x
    ranges = reference.maxabs(x.where(x.isfinite(), 0), call.group).to(call.hp_dtype)
    scale = operator("calculate_scale_for_cast")(
        ranges, _PER_TENSOR, _SCALE_MODES[call.rounding], fullscale=call.divisor, backoff=1.0
    )
    scale = scale.float().clamp(2.0**MIN_EXPONENT, 2.0**MAX_EXPONENT)
    return torch.where(ranges == 0, torch.ones_like(scale), scale)


def _is_calculated(call: DynamicScaleCall) -> bool:
    """Whether the bridge's operator gives the scale that the reference does."""
    alike = call.group == 0 and call.target in GAUDI_TARGETS and call.hp_dtype in WIDE
    return alike and call.rounding in _SCALE_MODES and offers("calculate_scale_for_cast")


def refuses_cast_by_range(call: CastByRangeCall) -> str | None:
    return refuses_full_scale(call.x, call.dtype, call.full_scale)


def cast_by_range(call: CastByRangeCall) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    scale, found = reference.scale_by_range(call.x, call.scale_of_range, call.per_row)
    return quantize(call.x.contiguous(), scale, call.dtype, call.full_scale), scale, found
