"""Casts, ranges and dynamic scales: schemas, fake kernels and the functions to call.

`scale` always means the dequantization multiplier `s` (x ≈ codes · s), float32. `full_scale` is the value casts
saturate at. `group` says how many values share a scale: 0 the whole tensor, -1 a row (a token: everything along the
last dimension), g > 0 each g values along the last dimension, of which the last group may have fewer.
"""

from __future__ import annotations

import torch

from . import reference
from .arguments import CastByRangeCall, CastFromCall, CastToCall, DynamicScaleCall, HistogramCall, MaxabsCall
from .declare import call, declare
from .gradients import CONSTANT
from .operands import BINS, group_shape
from .records import CallRecord


def cast_to_fp8(x: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype, full_scale: float) -> torch.Tensor:
    """Quantize: round-to-nearest-even of clamp(x · (1/scale), ±full_scale); NaN stays NaN, nothing else becomes it.

    Args:
        x: any shape, a floating-point dtype.
        scale: float32, `(1,)` or broadcastable to `x` (`(out, 1)` per channel, `(…, 1)` per token), or by groups along
            the last dimension, `[…, ⌈in/g⌉]` with g of 128 or 32, or by blocks of an `x` of two dimensions,
            `(⌈out/128⌉, ⌈in/128⌉)`.
        dtype: `torch.float8_e4m3fn` or `torch.float8_e5m2`.
        full_scale: 448, 240 (Gaudi2) or 57344 (E5M2).

    Returns:
        codes of `x`'s shape in `dtype`.
    """
    return call("cast_to_fp8", CastToCall(x, scale, dtype, full_scale))


def cast_to_fp8_by_range(
    x: torch.Tensor, scale_of_range: torch.Tensor, *, per_row: bool, dtype: torch.dtype, full_scale: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`cast_to_fp8` with the scale that follows from `x`'s own range, or from that of each of its rows.

    Args:
        x: `[rows, …]`, a floating-point dtype.
        scale_of_range: float32 `[32768]`, the scale of every range there is in bfloat16, by its bits (NaN: 0x7FC0).
        per_row: one scale a row; else one for the tensor.
        dtype: `torch.float8_e4m3fn` or `torch.float8_e5m2`.
        full_scale: 448, 240 (Gaudi2) or 57344 (E5M2).

    Returns:
        contiguous codes of `x`'s shape; the scale and max|x| in float32, `(rows, 1, …)` or `(1,)`.
    """
    return call("cast_to_fp8_by_range", CastByRangeCall(x, scale_of_range, per_row, dtype, full_scale))


def cast_from_fp8(
    x: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype, *, record: CallRecord | None = None
) -> torch.Tensor:
    """Dequantize: x · scale in float32, rounded once to `dtype`; shapes as in `cast_to_fp8`.

    `record` counts the call for a module that computes with what it gives.
    """
    return call("cast_from_fp8", CastFromCall(x, scale, dtype), record)


def maxabs(x: torch.Tensor, *, group: int = 0) -> torch.Tensor:
    """max|x| in float32: `(1,)`, one a row `[…, 1]`, or one a group `[…, ⌈in/group⌉]`.

    It is NaN where there is a NaN, 0 where there is nothing.

    Raises:
        FP8ConfigError: a group below -1.
    """
    return call("maxabs", MaxabsCall(x, group))


def histogram(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """How many values have which magnitude, and the largest, in one pass over memory.

    Args:
        x: any shape, a floating-point dtype.

    Returns:
        int64 `[4096]`: of bin b, values whose magnitude in float32 has the upper bits b, 8 of the exponent and 4 of the
        mantissa: from `b << 19` as the bits of a float32 to below `(b + 1) << 19`. Zeros, and what is below 2^-130, are
        in the first bin; Inf and NaN are in those from 4080 on.
        float32 `(1,)`: max|x|, NaN where there is a NaN, 0 where there is nothing.
    """
    return call("histogram", HistogramCall(x))


def dynamic_scale(
    x: torch.Tensor,
    *,
    group: int = 0,
    divisor: float,
    rounding: str,
    fp8_config: str,
    target: str,
    hp_dtype: torch.dtype,
) -> torch.Tensor:
    """The scale of `x` from its own range: round(max|x| / divisor), as `scales.activation_scale(dynamic=True)`.

    What is NaN or Inf does not count: it would leave nothing of the values that share the scale with it.

    Args:
        x: `[…, features]`, a floating-point dtype.
        group: what shares a scale, as in `maxabs`.
        divisor: full scale times backoff.
        rounding: a name from `rounding.ROUNDINGS`, as "hardware" (of `fp8_config` on `target`).
        hp_dtype: the dtype the range is rounded to and divided in.

    Returns:
        float32 of the shape of `maxabs`.

    Raises:
        FP8ConfigError: a group below -1.
    """
    return call("dynamic_scale", DynamicScaleCall(x, group, divisor, rounding, fp8_config, target, hp_dtype))


def _fake_cast(call: CastToCall | CastFromCall) -> torch.Tensor:
    return torch.empty_like(call.x, dtype=call.dtype)


def _fake_cast_by_range(call: CastByRangeCall) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x = call.x
    shape = (x.shape[0], *[1] * (x.ndim - 1)) if call.per_row else (1,)
    scale, found = (x.new_empty(shape, dtype=torch.float32) for _ in range(2))
    return x.new_empty(x.shape, dtype=call.dtype), scale, found


def _fake_ranges(call: MaxabsCall | DynamicScaleCall) -> torch.Tensor:
    return call.x.new_empty(group_shape(call.x.shape, call.group), dtype=torch.float32)


def _fake_histogram(call: HistogramCall) -> tuple[torch.Tensor, torch.Tensor]:
    return call.x.new_empty(BINS, dtype=torch.int64), call.x.new_empty(1, dtype=torch.float32)


declare(
    "cast_to_fp8",
    "(Tensor x, Tensor scale, ScalarType dtype, float full_scale) -> Tensor",
    CastToCall,
    _fake_cast,
    lambda call: reference.cast_to_fp8(*call),
)
declare(
    "cast_to_fp8_by_range",
    "(Tensor x, Tensor scale_of_range, bool per_row, ScalarType dtype, float full_scale) -> (Tensor, Tensor, Tensor)",
    CastByRangeCall,
    _fake_cast_by_range,
    lambda call: reference.cast_to_fp8_by_range(*call),
)
declare(
    "cast_from_fp8",
    "(Tensor x, Tensor scale, ScalarType dtype) -> Tensor",
    CastFromCall,
    _fake_cast,
    lambda call: reference.cast_from_fp8(*call),
)
declare("maxabs", "(Tensor x, int group) -> Tensor", MaxabsCall, _fake_ranges, lambda call: reference.maxabs(*call))
declare(
    "histogram",
    "(Tensor x) -> (Tensor, Tensor)",
    HistogramCall,
    _fake_histogram,
    lambda call: reference.histogram(*call),
)
declare(
    "dynamic_scale",
    "(Tensor x, int group, float divisor, str rounding, str fp8_config, str target, ScalarType hp_dtype) -> Tensor",
    DynamicScaleCall,
    _fake_ranges,
    lambda call: reference.dynamic_scale(*call),
    gradient=CONSTANT,
)
