"""Scales of activations: from a calibrated range, or from the tensor at hand (dynamic)."""

from __future__ import annotations

import torch

from .. import ops
from ..errors import FP8ScaleError
from ..formats import NumberFormat, hp_torch_dtype, number_format
from .methods import scale_method
from .rule import ScaleRule, checked_scale, value_of


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
        dynamic: the range is that of the very tensor to be scaled: the backoff is 0.5 where it would be less.
            Methods that only exist dynamically imply it.

    Returns:
        float32 scales, of the shape of `maxabs` (`(1,)` for a number), finite and positive.

    Raises:
        FP8ScaleError: a range that is negative, NaN or infinite.
        FP8ConfigError: an unknown method, target, format or dtype.
    """
    found = scale_method(method)
    rule = found.activation.with_backoff(found.dynamic_activation.backoff if dynamic and backoff is None else backoff)
    return scale_of_range(maxabs, rule, number_format(fp8_config, target), hp_torch_dtype(hp_dtype))


def scale_of_range(
    maxabs: torch.Tensor | float, rule: ScaleRule, fmt: NumberFormat, hp_dtype: torch.dtype
) -> torch.Tensor:
    """`activation_scale` by a rule.

    Raises:
        FP8ScaleError: a range that is negative, NaN or infinite.
    """
    ranges = torch.as_tensor(maxabs, dtype=torch.float32 if not torch.is_tensor(maxabs) else None)
    ranges = ranges.reshape(1) if ranges.ndim == 0 else ranges
    if not bool(torch.isfinite(ranges).all()) or bool((ranges < 0).any()):
        raise FP8ScaleError(
            f"maxabs={ranges.flatten()[:4].tolist()} is not a range: expected finite values >= 0; "
            "look for NaN or Inf in the calibration data or in the layer before"
        )
    return checked_scale(value_of(rule).of_range(ranges, rule, fmt, hp_dtype), tuple(ranges.shape), rule)


def dynamic(rule: ScaleRule, fmt: NumberFormat, hp_dtype: torch.dtype) -> ops.DynamicScale:
    """What operators find a scale by, from the range of the tensor at hand."""
    return ops.DynamicScale(rule.granularity.group, rule.divisor(fmt), rule.rounding, fmt.name, fmt.target, hp_dtype)


def dynamic_scale(x: torch.Tensor, rule: ScaleRule, fmt: NumberFormat, hp_dtype: torch.dtype) -> torch.Tensor:
    """The scale of `x` `[…, features]` from its own range: float32 `(1,)`, `[…, 1]` or `[…, groups]` by the rule."""
    return ops.dynamic_scale(x, **dynamic(rule, fmt, hp_dtype)._asdict())
