"""The reference: plain torch that defines the result of every operator, down to each rounding, on any device.

All products are formed from FP8 values held in float32 and accumulated in float32; `1/s` is taken in float32. Where
the other roundings fall is the `arithmetic`:

* "fused": product times scales plus bias in float32, then one rounding to the output dtype.
* "gaudi": the product times scales is rounded to the output dtype, then the bias is added in that dtype, as INC and
  the cards do (a bias inside the GEMM would block fusing the next cast).
* "qdq": both operands are dequantized to the input's dtype, then an ordinary operator of that dtype runs.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from ..errors import FP8ConfigError, nearest
from ..formats import number_format
from ..rounding import scale_from_maxabs

ARITHMETICS = ("fused", "gaudi", "qdq")


def cast_to_fp8(x: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype, full_scale: float) -> torch.Tensor:
    scaled = x.float() * scale.float().reciprocal()
    return scaled.clamp_(-full_scale, full_scale).to(dtype)


def cast_from_fp8(x: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return (x.float() * scale.float()).to(dtype)


def dynamic_scale(
    x: torch.Tensor,
    per_token: bool,
    divisor: float,
    rounding: str,
    fp8_config: str,
    target: str,
    hp_dtype: torch.dtype,
) -> torch.Tensor:
    fmt = number_format(fp8_config, target)
    if x.numel() == 0:
        return torch.ones((*x.shape[:-1], 1) if per_token else (1,), dtype=torch.float32, device=x.device)
    maxabs = x.abs().amax(dim=-1).unsqueeze(-1) if per_token else x.abs().amax().reshape(1)
    return scale_from_maxabs(maxabs, divisor, rounding, fmt, hp_dtype, reciprocal=fmt.is_gaudi and not per_token)


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    input_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    full_scale: float,
    arithmetic: str,
) -> torch.Tensor:
    return _apply(F.linear, x, weight, weight_scale, input_scale, bias, full_scale, arithmetic, channel_dim=-1)


def conv2d(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    input_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    full_scale: float,
    arithmetic: str,
) -> torch.Tensor:
    def convolve(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return F.conv2d(x, weight, bias, stride, padding, dilation, groups)

    return _apply(convolve, x, weight, weight_scale, input_scale, bias, full_scale, arithmetic, channel_dim=-3)


def _apply(
    product: Callable[..., torch.Tensor],
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    input_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    full_scale: float,
    arithmetic: str,
    channel_dim: int,
) -> torch.Tensor:
    """Round the operands, multiply them with `product`, and round the result where `arithmetic` says."""
    if arithmetic not in ARITHMETICS:
        raise FP8ConfigError(f"arithmetic={arithmetic!r} is unknown: {nearest(arithmetic, ARITHMETICS)}")
    if arithmetic == "qdq":
        if input_scale is not None:
            x = cast_from_fp8(cast_to_fp8(x, input_scale, weight.dtype, full_scale), input_scale, x.dtype)
        return product(x, cast_from_fp8(weight, weight_scale, x.dtype), None if bias is None else bias.to(x.dtype))
    codes, scale = x.float(), _along(weight_scale, channel_dim)
    if input_scale is not None:
        codes = cast_to_fp8(x, input_scale, weight.dtype, full_scale).float()
        scale = input_scale * scale
    result = product(codes, weight.float()) * scale
    if bias is None:
        return result.to(x.dtype)
    bias = _along(bias, channel_dim)
    if arithmetic == "gaudi":
        return result.to(x.dtype) + bias.to(x.dtype)
    return (result + bias.float()).to(x.dtype)


def _along(per_channel: torch.Tensor, channel_dim: int) -> torch.Tensor:
    """`(1,)`, `(out,)` or `(out, 1, …)` laid along the output's channel dimension (counted from the end)."""
    return per_channel.reshape(-1, *[1] * (-channel_dim - 1))
