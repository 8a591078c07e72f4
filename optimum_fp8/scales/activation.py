"""Scales of activations: from a calibrated range, or from the tensor at hand (dynamic)."""

from __future__ import annotations

import torch

from ..errors import FP8ConfigError, FP8ScaleError
from ..formats import NumberFormat, hp_torch_dtype, number_format
from ..rounding import scale_from_maxabs
from .methods import DYNAMIC_BACKOFF, ScaleRule, scale_method


def activation_scale(
    maxabs: torch.Tensor | float,
    *,
    method: str,
    target: str = "cpu",
    fp8_config: str = "E4M3",
    hp_dtype: str = "bf16",
    backoff: float | None = None,
    dynamic: bool = False,
) -> torch.Tensor:
    """The scale `s` of an activation (x_q = cast(x / s), x ≈ x_q · s) from its range.

    s = round(maxabs / (full_scale · backoff)), the arithmetic in `hp_dtype`. On Gaudi targets the division is a
    multiplication by the reciprocal rounded to `hp_dtype`, as measured on the cards.

    Args:
        maxabs: max|x|, a number or a tensor of any shape (one range each).
        method: a name from `SCALE_METHODS`.
        target: "gaudi2", "gaudi3", "cuda" or "cpu".
        fp8_config: "E4M3" or "E5M2".
        hp_dtype: "bf16", "fp16" or "fp32".
        backoff: replaces the method's.
        dynamic: the range is that of the very tensor to be scaled: the backoff is 0.5 instead of 0.25.
            Methods that only exist dynamically imply it.

    Returns:
        float32 scales, of the shape of `maxabs` (`(1,)` for a number), finite and positive.

    Raises:
        FP8ScaleError: a range that is negative, NaN or infinite.
        FP8ConfigError: an unknown method, target, format or dtype.
    """
    fmt, rule = number_format(fp8_config, target), scale_method(method).activation
    ranges = torch.as_tensor(maxabs, dtype=torch.float32 if not torch.is_tensor(maxabs) else None)
    ranges = ranges.reshape(1) if ranges.ndim == 0 else ranges
    if not bool(torch.isfinite(ranges).all()) or bool((ranges < 0).any()):
        raise FP8ScaleError(
            f"maxabs={ranges.flatten()[:4].tolist()} is not a range: expected finite values >= 0; "
            "look for NaN or Inf in the calibration data or in the layer before"
        )
    fixed = fixed_scale(rule, fmt)
    if fixed is not None:
        return torch.full(ranges.shape, fixed, dtype=torch.float32, device=ranges.device)
    divisor = activation_divisor(rule, fmt, backoff=backoff, dynamic=dynamic)
    reciprocal = fmt.is_gaudi and rule.granularity == "tensor"
    return scale_from_maxabs(ranges, divisor, rule.rounding, fmt, hp_torch_dtype(hp_dtype), reciprocal=reciprocal)


def activation_divisor(rule: ScaleRule, fmt: NumberFormat, *, backoff: float | None, dynamic: bool) -> float:
    """The FP8 value that the largest activation is mapped to: full scale times backoff."""
    return full_scale_part(fmt, backoff, DYNAMIC_BACKOFF if dynamic else rule.backoff)


def full_scale_part(fmt: NumberFormat, backoff: float | None, default: float) -> float:
    """The full scale times `backoff` (or the `default` where it is None).

    Raises:
        FP8ConfigError: the backoff is not above 0 and at most 1.
    """
    backoff = default if backoff is None else backoff
    if not 0.0 < backoff <= 1.0:
        raise FP8ConfigError(f"backoff={backoff} is out of range: expected 0 < backoff <= 1")
    return fmt.full_scale * backoff


def fixed_scale(rule: ScaleRule, fmt: NumberFormat) -> float | None:
    """The scale of a rule that looks at no data, or None.

    Off Gaudi there is no table whose first scale could be taken: there the single scale is 1.0, which the hardware
    applies for free and which E4M3's range around 1 suits best.
    """
    if rule.value == "unit":
        return 1.0
    if rule.value == "first_hardware":
        return fmt.hardware_scales.descending()[0] if fmt.is_gaudi else 1.0
    return None
