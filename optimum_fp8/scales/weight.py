"""Scales of weights: from the range of the tensor or of each output channel, or by a search for the least error."""

from __future__ import annotations

from functools import cache

import torch

from .. import ops
from ..errors import FP8ScaleError
from ..formats import MAX_EXPONENT, MIN_EXPONENT, NumberFormat, hp_torch_dtype, number_format
from ..rounding import round_scale, scale_from_maxabs
from .activation import fixed_scale, full_scale_part
from .methods import ScaleRule, scale_method
from .search import search_channel_scales, search_tensor_scale


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
    fmt, rule = number_format(fp8_config, target), scale_method(method).weight
    weight = weight.detach()
    if weight.dtype == torch.float16:
        weight = weight.to(torch.bfloat16)
    maxabs = weight_maxabs(weight, rule.granularity)
    fixed = fixed_scale(rule, fmt)
    if fixed is not None:
        return torch.full((1,), fixed, dtype=torch.float32, device=weight.device)
    divisor = full_scale_part(fmt, backoff, rule.backoff)
    if rule.value == "maxabs":
        return _scale_from_range(maxabs, divisor, rule, fmt, hp_torch_dtype(hp_dtype))
    if rule.granularity == "tensor":
        return search_tensor_scale(weight, rule.rounding, fmt, hp_torch_dtype(hp_dtype))
    reference = round_scale(_raw_channel_scale(maxabs, divisor), "pow2", fmt)
    return search_channel_scales(weight, reference, fmt).clamp(2.0**MIN_EXPONENT, 2.0**MAX_EXPONENT)


def quantized_weight(
    weight: torch.Tensor,
    *,
    method: str,
    target: str = "cpu",
    fp8_config: str = "E4M3",
    hp_dtype: str = "bf16",
    backoff: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A weight in FP8: where its scale follows from a range of 16 bits, in one pass over memory.

    Args: those of `weight_scale`.

    Returns:
        contiguous codes of the weight's shape; `weight_scale`'s scale; max|w| in float32, one or one a channel.

    Raises: what `weight_scale` raises.
    """
    fmt, rule, weight = number_format(fp8_config, target), scale_method(method).weight, weight.detach()
    if rule.value == "maxabs" and weight.dtype in (torch.bfloat16, torch.float16) and weight.numel():
        divisor = full_scale_part(fmt, backoff, rule.backoff)
        scales, per_row = _scale_of_range(divisor, rule, fmt, hp_torch_dtype(hp_dtype)), rule.granularity == "channel"
        codes, scale, maxabs = ops.cast_to_fp8_by_range(
            weight, scales.to(weight.device), per_row=per_row, dtype=fmt.dtype, full_scale=fmt.full_scale
        )
        _refuse_unsound(maxabs)
        return codes, scale, maxabs
    scale = weight_scale(
        weight, method=method, target=target, fp8_config=fp8_config, hp_dtype=hp_dtype, backoff=backoff
    )
    return ops.cast_to_fp8(weight, scale, fmt.dtype, fmt.full_scale).contiguous(), scale, ops.maxabs(weight)


def weight_maxabs(weight: torch.Tensor, granularity: str = "tensor") -> torch.Tensor:
    """max|w| in the weight's dtype: `(1,)` per tensor, `(out, 1, …)` per channel; no copy of the weight is made.

    Raises:
        FP8ScaleError: the weight holds NaN or Inf, or nothing at all.
    """
    if weight.numel() == 0:
        raise FP8ScaleError(f"the weight of shape {tuple(weight.shape)} is empty: it has no range to scale by")
    if granularity == "channel":
        maxabs = ops.maxabs(weight.flatten(1), per_token=True).reshape(-1, *[1] * (weight.ndim - 1))
    else:
        maxabs = ops.maxabs(weight)
    maxabs = maxabs.to(weight.dtype)
    _refuse_unsound(maxabs)
    return maxabs


def _refuse_unsound(maxabs: torch.Tensor) -> None:
    if not bool(torch.isfinite(maxabs).all()):
        raise FP8ScaleError("the weight holds NaN or Inf: expected finite values; check the checkpoint")


def _scale_from_range(
    maxabs: torch.Tensor, divisor: float, rule: ScaleRule, fmt: NumberFormat, hp_dtype: torch.dtype
) -> torch.Tensor:
    if rule.granularity == "channel":
        return round_scale(_raw_channel_scale(maxabs, divisor), rule.rounding, fmt)
    return scale_from_maxabs(maxabs, divisor, rule.rounding, fmt, hp_dtype, reciprocal=fmt.is_gaudi)


def _raw_channel_scale(maxabs: torch.Tensor, divisor: float) -> torch.Tensor:
    """Per-channel scales keep the plain division, and give a channel of zeros the smallest scale, as INC does."""
    return (maxabs / divisor).clamp(min=2.0**MIN_EXPONENT)


@cache
def _scale_of_range(divisor: float, rule: ScaleRule, fmt: NumberFormat, hp_dtype: torch.dtype) -> torch.Tensor:
    """The scale of every bfloat16 range, by its bits, float32 `[32768]`."""
    ranges = torch.arange(1 << 15, dtype=torch.int16, device="cpu").view(torch.bfloat16)
    return _scale_from_range(ranges, divisor, rule, fmt, hp_dtype)
