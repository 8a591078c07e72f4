"""Casts to FP8 and back, with every layout of scales."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ...formats import NumberFormat
from ...ops.arguments import CastByRangeCall, CastFromCall, CastToCall
from ...rounding import exp2
from ..case import DTYPE_NAMES, Case, Draw, named, scale

_SHAPE = (200, 300)  # in blocks and groups, the last ones are smaller
_LAYOUTS = {  # of scales for a tensor of that shape
    "per tensor": (1,),
    "per channel": (200, 1),
    "by blocks": (2, 3),
    "by groups of 128": (200, 3),
    "by groups of 32": (200, 10),
}


def cases(fmt: NumberFormat) -> Iterator[Case]:
    """Of `cast_to_fp8`, `cast_from_fp8` and `cast_to_fp8_by_range`."""
    draw = Draw(fmt)
    for dtype in DTYPE_NAMES:
        yield _to(draw, "hardware scale", scale(2.0**-4), dtype)
        yield _from(draw, "hardware scale", scale(2.0**-4), dtype)
    for layout, shape in _LAYOUTS.items():
        yield _to(draw, layout, draw.scales(*shape, around=0.03))
        yield _from(draw, layout, draw.scales(*shape, around=0.03))
    tokens = CastToCall(draw.values(2, 5, 64), draw.scales(2, 5, 1, around=0.03), fmt.dtype, fmt.full_scale)
    yield Case("cast_to_fp8", named("bf16", "per token"), tokens)
    kernels = CastToCall(draw.values(8, 4, 3, 3), draw.scales(8, 1, 1, 1, around=0.03), fmt.dtype, fmt.full_scale)
    yield Case("cast_to_fp8", named("bf16", "per channel of a convolution"), kernels)
    codes = CastFromCall(_all_codes(fmt), scale(2.0**-4), torch.float32)
    yield Case("cast_from_fp8", named("fp32", "all codes"), codes)
    table = _powers_of_two_of_ranges(fmt)
    for per_row in (False, True):
        call = CastByRangeCall(draw.values(40, 96), table, per_row, fmt.dtype, fmt.full_scale)
        yield Case("cast_to_fp8_by_range", named("bf16", "per row" if per_row else "per tensor"), call)


def _to(draw: Draw, layout: str, scales: torch.Tensor, dtype: torch.dtype = torch.bfloat16) -> Case:
    call = CastToCall(draw.values(*_SHAPE, dtype=dtype), scales, draw.fmt.dtype, draw.fmt.full_scale)
    return Case("cast_to_fp8", named(DTYPE_NAMES[dtype], layout), call)


def _from(draw: Draw, layout: str, scales: torch.Tensor, dtype: torch.dtype = torch.bfloat16) -> Case:
    call = CastFromCall(draw.codes(*_SHAPE), scales, dtype)
    return Case("cast_from_fp8", named(DTYPE_NAMES[dtype], layout), call)


def _all_codes(fmt: NumberFormat) -> torch.Tensor:
    """Every code that stands for a number up to the full scale."""
    codes = torch.arange(256, dtype=torch.uint8).view(fmt.dtype)
    return codes[codes.float().abs() <= fmt.full_scale]


def _powers_of_two_of_ranges(fmt: NumberFormat) -> torch.Tensor:
    """For every range in bfloat16 the power of two that maps it to between a half and all of the full scale."""
    ranges = torch.arange(1 << 15, dtype=torch.int16).view(torch.bfloat16).float()
    exponent = (ranges / fmt.full_scale).log2().ceil()
    return exp2(exponent.nan_to_num(0.0, posinf=0.0, neginf=0.0).clamp(-126, 126))
