"""Rounding of scales: as they are, to a power of two, or to the target's hardware set.

The first three work on a tensor of positive raw scales in the high-precision dtype, because where the logarithm is
rounded decides the result: in bfloat16 a value a hair above a power of two rounds down. That is what Gaudi cards do and
what Intel Neural Compressor does, so it is what we do. The three of e8m0, whose scales are exponents alone, are exact.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from .errors import FP8ConfigError, nearest
from .formats import MAX_EXPONENT, MIN_EXPONENT, NumberFormat

Rounding = Callable[[torch.Tensor, NumberFormat], torch.Tensor]


def exp2(exponent: torch.Tensor) -> torch.Tensor:
    """2^exponent in float32, exact: the exponent's bits are written, nothing is computed. Integers in [-126, 127]."""
    return ((exponent.to(torch.int32) + 127) << 23).view(torch.float32)


def ceil_log2(raw: torch.Tensor) -> torch.Tensor:
    """⌈log2(raw)⌉ with log2 evaluated and rounded in `raw`'s own dtype; float32, -inf for 0."""
    return torch.log2(raw).float().ceil()


def round_scale(raw: torch.Tensor, rounding: str, fmt: NumberFormat) -> torch.Tensor:
    """Round raw scales.

    Args:
        raw: non-negative scales of any shape, in the dtype the arithmetic happens in.
        rounding: a name from `ROUNDINGS`.
        fmt: the number format, for its hardware scales.

    Returns:
        float32 scales of the same shape, finite, positive and with a finite reciprocal. Zeros become the smallest
        scale that exists; what zero should mean is the caller's to decide.
    """
    check_rounding(rounding)
    return ROUNDINGS[rounding](raw, fmt)


def check_rounding(rounding: str) -> None:
    """Refuse a rounding that is not registered.

    Raises:
        FP8ConfigError: the message names the nearest.
    """
    if rounding not in ROUNDINGS:
        raise FP8ConfigError(f"rounding={rounding!r} is unknown: {nearest(rounding, ROUNDINGS)}")


def _identity(raw: torch.Tensor, fmt: NumberFormat) -> torch.Tensor:
    return raw.float().nan_to_num(nan=1.0).clamp(2.0**MIN_EXPONENT, 2.0**MAX_EXPONENT)


def _pow2(raw: torch.Tensor, fmt: NumberFormat) -> torch.Tensor:
    return _power(raw, MIN_EXPONENT, MAX_EXPONENT, 1)


def _hardware(raw: torch.Tensor, fmt: NumberFormat) -> torch.Tensor:
    hardware = fmt.hardware_scales
    return _power(raw, hardware.min_exponent, hardware.max_exponent, hardware.step)


def _power(raw: torch.Tensor, low: int, high: int, step: int) -> torch.Tensor:
    """The smallest power of two of a set that is not below `raw`, as `raw`'s dtype takes the logarithm."""
    exponent = (ceil_log2(raw) / step).ceil() * step
    # A NaN range (a NaN in the data) must not become a random exponent; the NaN itself survives the cast.
    return exp2(exponent.nan_to_num(nan=0.0, posinf=high, neginf=low).clamp(low, high))


def _e8m0_ceil(raw: torch.Tensor, fmt: NumberFormat) -> torch.Tensor:
    """The smallest power of two that is not below the raw scale: nothing saturates (transformers' rule)."""
    mantissa, exponent = torch.frexp(raw.float())  # in [0.5, 1), so that a power of two has 0.5
    return _clamped(exponent - (mantissa == 0.5).to(exponent.dtype), raw)


def _e8m0_above(raw: torch.Tensor, fmt: NumberFormat) -> torch.Tensor:
    """The smallest power of two above the raw scale (compressed-tensors' rule): as `_e8m0_ceil`, but twice as much
    where the largest value would become the full scale itself."""
    return _clamped(torch.frexp(raw.float()).exponent, raw)


def _e8m0_floor(raw: torch.Tensor, fmt: NumberFormat) -> torch.Tensor:
    """2^(⌊log2 max|x|⌋ - ⌊log2 full scale⌋) (OCP's Microscaling Formats 1.0, 6.3): the largest values may saturate."""
    of_format = math.floor(math.log2(fmt.full_scale))
    # The raw scale is a range over the full scale, whose product may have been rounded below a power of two.
    maxabs = raw.float() * (fmt.full_scale * (1 + 2.0**-22))
    return _clamped(torch.frexp(maxabs).exponent - 1 - of_format, raw)


def _clamped(exponent: torch.Tensor, raw: torch.Tensor) -> torch.Tensor:
    exponent = torch.where(raw == 0, MIN_EXPONENT, torch.where(torch.isinf(raw), MAX_EXPONENT, exponent))
    return exp2(torch.where(torch.isnan(raw), 0, exponent).clamp(MIN_EXPONENT, MAX_EXPONENT))


ROUNDINGS: dict[str, Rounding] = {
    "identity": _identity,
    "pow2": _pow2,
    "hardware": _hardware,
    "e8m0_ceil": _e8m0_ceil,
    "e8m0_above": _e8m0_above,
    "e8m0_floor": _e8m0_floor,
}


def register_rounding(name: str, round_raw: Rounding) -> None:
    """Make a rounding known by `name`: a function of raw scales and the number format, with `round_scale`'s results."""
    ROUNDINGS[name] = round_raw


def scale_from_maxabs(
    maxabs: torch.Tensor,
    divisor: float,
    rounding: str,
    fmt: NumberFormat,
    hp_dtype: torch.dtype,
    *,
    reciprocal: bool = False,
) -> torch.Tensor:
    """The dequantization scale of a range: round(maxabs / divisor), with `divisor = full_scale * backoff`.

    Args:
        maxabs: ranges of any shape, non-negative.
        divisor: largest FP8 value that `maxabs` may be mapped to.
        rounding: a name from `ROUNDINGS`.
        fmt: the number format.
        hp_dtype: the dtype ranges are rounded to and the arithmetic happens in.
        reciprocal: multiply by 1/divisor rounded to `hp_dtype`, as Gaudi cards do, instead of dividing.

    Returns:
        float32 scales of `maxabs`' shape. A zero range gives 1.0 (nothing is known of the tensor, so its scale should
        do no harm), on Gaudi with hardware rounding the smallest hardware scale, as the cards do.
    """
    zero_scale = fmt.hardware_scales.descending()[-1] if fmt.is_gaudi and rounding == "hardware" else 1.0
    scale = round_scale(_raw_scale(maxabs, divisor, hp_dtype, reciprocal), rounding, fmt)
    if hp_dtype == torch.float16:  # overflows at 65504 and loses small ranges: float32 where that happened
        raw = _raw_scale(maxabs, divisor, hp_dtype, reciprocal).float()
        exact = round_scale(_raw_scale(maxabs, divisor, torch.float32, reciprocal), rounding, fmt)
        scale = torch.where(torch.isfinite(raw) & (raw > 0), scale, exact)
    return torch.where(maxabs == 0, torch.full_like(scale, zero_scale), scale)


def _raw_scale(maxabs: torch.Tensor, divisor: float, hp_dtype: torch.dtype, reciprocal: bool) -> torch.Tensor:
    if reciprocal:
        return maxabs.to(hp_dtype) * torch.tensor(1.0 / divisor, dtype=hp_dtype, device=maxabs.device)
    return maxabs.to(hp_dtype) / divisor
