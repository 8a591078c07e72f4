"""Scales of weights: from the range of the tensor or of its parts, or by a search for the least error."""

from __future__ import annotations

from functools import cache

import torch

from .. import ops
from ..errors import FP8ScaleError
from ..formats import NumberFormat, hp_torch_dtype, number_format
from .granularity import Granularity, PerChannel, PerTensor, Shape
from .methods import scale_method
from .rule import ScaleRule, checked_scale, value_of


def weight_scale(
    weight: torch.Tensor,
    *,
    method: str,
    target: str = "cpu",
    fp8_config: str = "E4M3",
    hp_dtype: str = "bf16",
    backoff: float | None = None,
) -> torch.Tensor:
    """The scale `s` of a weight (w_q = cast(w / s), w ≈ w_q · s).

    Args:
        weight: `[out, in]` or `[out, in, kh, kw]`, a floating-point dtype; output channels lead.
        method: a name from `SCALE_METHODS`.
        target: "gaudi2", "gaudi3", "cuda" or "cpu".
        fp8_config: "E4M3" or "E5M2".
        hp_dtype: dtype of per-tensor arithmetic ("bf16", "fp16", "fp32"); per-channel scales are computed in the
            weight's own dtype (float16 counts as bfloat16).
        backoff: replaces the method's.

    Returns:
        float32, `(1,)` per tensor or `(out, 1, …)` per output channel, finite and positive.

    Raises:
        FP8ScaleError: the weight holds NaN or Inf, or nothing at all.
        FP8ConfigError: an unknown method, target, format or dtype.
    """
    rule = scale_method(method).weight.with_backoff(backoff)
    return scale_of_weight(weight, rule, number_format(fp8_config, target), hp_torch_dtype(hp_dtype))


def scale_of_weight(weight: torch.Tensor, rule: ScaleRule, fmt: NumberFormat, hp_dtype: torch.dtype) -> torch.Tensor:
    """`weight_scale` by a rule: float32 of the rule's granularity, `(1,)` where the value is fixed."""
    weight = weight.detach()
    if weight.dtype == torch.float16:
        weight = weight.to(torch.bfloat16)
    maxabs = weight_maxabs(weight, rule.granularity)
    return checked_scale(value_of(rule).of_weight(weight, maxabs, rule, fmt, hp_dtype), tuple(maxabs.shape), rule)


def quantized_weight(
    weight: torch.Tensor,
    *,
    method: str,
    target: str = "cpu",
    fp8_config: str = "E4M3",
    hp_dtype: str = "bf16",
    backoff: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`quantize_weight` by a method's name; arguments as for `weight_scale`."""
    rule = scale_method(method).weight.with_backoff(backoff)
    return quantize_weight(weight, rule, number_format(fp8_config, target), hp_torch_dtype(hp_dtype))


def quantize_weight(
    weight: torch.Tensor, rule: ScaleRule, fmt: NumberFormat, hp_dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A weight in FP8: where its scale follows from a range of 16 bits, in one pass over memory.

    Args:
        weight: `[out, in, …]`, a floating-point dtype.
        rule: how its scale is found.
        fmt: the number format.
        hp_dtype: dtype of per-tensor arithmetic.

    Returns:
        contiguous codes of the weight's shape; the float32 scale; max|w| in float32, one or one a channel. Of a weight
        on meta, which has no values, they are on meta as well.

    Raises:
        FP8ScaleError: the weight holds NaN or Inf, or nothing at all.
    """
    weight, by_range = weight.detach(), value_of(rule).only_range and weight.dtype in (torch.bfloat16, torch.float16)
    if weight.is_meta:
        scale = torch.empty(scale_shape(weight.shape, rule), dtype=torch.float32, device="meta")
        return torch.empty(weight.shape, dtype=fmt.dtype, device="meta"), scale, scale.new_empty((1,))
    if by_range and weight.numel() and isinstance(rule.granularity, (PerTensor, PerChannel)):
        codes, scale, maxabs = ops.cast_to_fp8_by_range(
            weight,
            _scale_of_bfloat16(rule, fmt, hp_dtype).to(weight.device),
            per_row=isinstance(rule.granularity, PerChannel),
            dtype=fmt.dtype,
            full_scale=fmt.full_scale,
        )
        _refuse_unsound(maxabs)
        return codes, scale, maxabs
    scale = scale_of_weight(weight, rule, fmt, hp_dtype)
    return ops.cast_to_fp8(weight, scale, fmt.dtype, fmt.full_scale).contiguous(), scale, ops.maxabs(weight)


def scale_shape(shape: Shape, rule: ScaleRule) -> tuple[int, ...]:
    """The shape of the scale of a weight of `shape`."""
    return rule.granularity.scale_shape(shape) if rule.needs_range else (1,)


def weight_maxabs(weight: torch.Tensor, granularity: Granularity | None = None) -> torch.Tensor:
    """max|w| in the weight's dtype at a granularity (by default per tensor, `(1,)`); no copy of the weight is made.

    Raises:
        FP8ScaleError: the weight holds NaN or Inf, or nothing at all.
    """
    if weight.numel() == 0:
        raise FP8ScaleError(f"the weight of shape {tuple(weight.shape)} is empty: it has no range to scale by")
    maxabs = (granularity or PerTensor()).maxabs(weight).to(weight.dtype)
    _refuse_unsound(maxabs)
    return maxabs


def _refuse_unsound(maxabs: torch.Tensor) -> None:
    if not bool(torch.isfinite(maxabs).all()):
        raise FP8ScaleError("the weight holds NaN or Inf: expected finite values; check the checkpoint")


@cache
def _scale_of_bfloat16(rule: ScaleRule, fmt: NumberFormat, hp_dtype: torch.dtype) -> torch.Tensor:
    """The scale of every bfloat16 range, by its bits, float32 `[32768]`."""
    ranges = torch.arange(1 << 15, dtype=torch.int16, device="cpu").view(torch.bfloat16)
    scales = value_of(rule).of_weight(ranges, ranges, rule, fmt, hp_dtype)
    return checked_scale(scales.expand(ranges.shape).contiguous(), tuple(ranges.shape), rule)
