"""The reference: plain torch that defines the result of every operator, down to each rounding, on any device.

All products are formed from FP8 values held in float32 and accumulated in float32; `1/s` is taken in float32. Where
the other roundings fall is the `arithmetic`:

* "fused": product times scales plus bias in float32, then one rounding to the output dtype.
* "gaudi": the product times scales is rounded to the output dtype, then the bias is added in that dtype, as INC and
  the cards do (a bias inside the GEMM would block fusing the next cast).
* "qdq": both operands are dequantized to the input's dtype, then an ordinary operator of that dtype runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

from ..errors import FP8ConfigError, FP8OperandError, FP8ScaleError, nearest
from ..formats import FP8_DTYPES, is_fp8, number_format
from ..rounding import scale_from_maxabs

ARITHMETICS = ("fused", "gaudi", "qdq")
_CHUNK_ELEMENTS = 1 << 20  # cast at a time: bounds the float32 working copy at 4 MiB
BLOCK = 128  # side of the blocks of a weight that share a scale


def cast_to_fp8(x: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype, full_scale: float) -> torch.Tensor:
    _check_format(dtype, full_scale)
    scale = spread(scale, x).float()
    if x.numel() <= _CHUNK_ELEMENTS or x.ndim < 2:
        return (x.float() * scale.reciprocal()).clamp_(-full_scale, full_scale).to(dtype)
    codes = torch.empty_like(x, dtype=dtype)
    rows = max(1, _CHUNK_ELEMENTS * x.shape[0] // x.numel())
    for start in range(0, x.shape[0], rows):
        part = slice(start, start + rows)
        part_scale = scale[part] if scale.ndim == x.ndim and scale.shape[0] > 1 else scale
        codes[part] = (x[part].float() * part_scale.reciprocal()).clamp_(-full_scale, full_scale).to(dtype)
    return codes


def _check_format(dtype: torch.dtype, full_scale: float) -> None:
    """Refuse what is no FP8 format, and a value at which its codes cannot saturate.

    Raises:
        FP8ConfigError: names what was found and expected.
    """
    if dtype not in FP8_DTYPES.values():
        raise FP8ConfigError(f"a cast to {dtype}: expected one of {', '.join(map(str, FP8_DTYPES.values()))}")
    largest = torch.finfo(dtype).max
    if not 0 < full_scale <= largest:
        raise FP8ConfigError(f"full_scale={full_scale} for {dtype}: expected a value above 0, {largest} at most")


def cast_to_fp8_with_maxabs(
    x: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype, full_scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    return cast_to_fp8(x, scale, dtype, full_scale), maxabs(x, False)


def cast_to_fp8_by_range(
    x: torch.Tensor, scale_of_range: torch.Tensor, per_row: bool, dtype: torch.dtype, full_scale: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x = x.contiguous()
    found = maxabs(x.reshape(x.shape[0], -1), True).reshape(-1, *[1] * (x.ndim - 1)) if per_row else maxabs(x, False)
    bits = found.to(torch.bfloat16).view(torch.int16).long()
    scale = scale_of_range[torch.where(found.isnan(), 0x7FC0, bits)]
    return cast_to_fp8(x, scale, dtype, full_scale), scale, found


def cast_from_fp8(x: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return (x.float() * spread(scale, x).float()).to(dtype)


def maxabs(x: torch.Tensor, per_token: bool) -> torch.Tensor:
    if x.numel() == 0:
        return torch.zeros((*x.shape[:-1], 1) if per_token else (1,), dtype=torch.float32, device=x.device)
    magnitudes = x.abs()
    return (magnitudes.amax(dim=-1, keepdim=True) if per_token else magnitudes.amax().reshape(1)).float()


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
    ranges = maxabs(x, per_token).to(x.dtype)
    return scale_from_maxabs(ranges, divisor, rounding, fmt, hp_dtype, reciprocal=fmt.is_gaudi and not per_token)


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    input_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    full_scale: float,
    arithmetic: str,
) -> torch.Tensor:
    _check_operands(x, weight, input_scale, bias)
    return _apply(F.linear, x, weight, weight_scale, input_scale, bias, full_scale, arithmetic, channel_dim=-1)


def _check_operands(
    x: torch.Tensor, weight: torch.Tensor, input_scale: torch.Tensor | None, bias: torch.Tensor | None
) -> None:
    """Refuse operands of a linear layer that do not belong together.

    Raises:
        FP8OperandError: names what was found and expected.
        FP8ScaleError: the input's scale does not fit it.
    """
    if is_fp8(x.dtype) or not x.is_floating_point() or not is_fp8(weight.dtype):
        raise FP8OperandError(
            f"linear: an input in {x.dtype} and a weight in {weight.dtype}: expected an input in high precision and a "
            "weight in FP8 (codes that are held as bytes are seen as FP8 by .view(dtype))"
        )
    if weight.ndim != 2 or x.ndim == 0 or x.shape[-1] != weight.shape[1]:
        raise FP8OperandError(
            f"linear: an input of shape {tuple(x.shape)} and a weight of shape {tuple(weight.shape)}: expected "
            "(…, in) and (out, in); a weight stored as (in, out) has to be transposed"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise FP8OperandError(
            f"linear: a bias of shape {tuple(bias.shape)} for a weight of shape {tuple(weight.shape)}: expected "
            f"({weight.shape[0]},), one value for each output"
        )
    if input_scale is not None and input_scale.numel() != 1 and input_scale.shape != (*x.shape[:-1], 1):
        raise FP8ScaleError(
            f"linear: an input scale of shape {tuple(input_scale.shape)} for an input of shape {tuple(x.shape)}: "
            f"expected (1,) or {(*x.shape[:-1], 1)}, one for each row"
        )


def linears(
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    weight_scales: Sequence[torch.Tensor],
    input_scales: Sequence[torch.Tensor | None],
    biases: Sequence[torch.Tensor | None],
    full_scale: float,
    arithmetic: str,
) -> list[torch.Tensor]:
    each = zip(weights, weight_scales, input_scales, biases, strict=True)
    return [linear(x, *one, full_scale, arithmetic) for one in each]


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
    codes, values = x.float(), weight.float()
    if is_blocked(weight_scale, weight):
        values, scale = values * spread(weight_scale, weight), torch.ones(1, device=weight.device)
    else:
        scale = _along(weight_scale, channel_dim)
    if input_scale is not None:
        codes = cast_to_fp8(x, input_scale, weight.dtype, full_scale).float()
        scale = input_scale * scale
    return with_bias(
        product(codes, values) * scale, None if bias is None else _along(bias, channel_dim), x.dtype, arithmetic
    )


def with_bias(result: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype, arithmetic: str) -> torch.Tensor:
    """The float32 result of a product, with its bias, rounded to `dtype` where "fused" or "gaudi" arithmetic does."""
    if bias is None:
        return result.to(dtype)
    if arithmetic == "gaudi":
        return result.to(dtype) + bias.to(dtype)
    return (result + bias.float()).to(dtype)


def is_blocked(scale: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether a weight's scale is by blocks, `(⌈out/128⌉, ⌈in/128⌉)`, rather than per tensor or output channel.

    Raises:
        FP8ScaleError: it is none of these.
    """
    count, out = scale.numel(), weight.shape[0]
    if count == 1 or (count == out and scale.shape[0] == out):
        return False
    blocks = tuple(-(-size // BLOCK) for size in weight.shape)
    if weight.ndim == 2 and tuple(scale.shape) == blocks:
        return True
    raise FP8ScaleError(
        f"a scale of shape {tuple(scale.shape)} does not fit a weight of shape {tuple(weight.shape)}: expected (1,), "
        f"({out}, 1, …) or, by blocks of {BLOCK}, {blocks}"
    )


def spread(scale: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """`scale` so that it broadcasts to `x`, and to no more: scales by blocks are repeated over their blocks."""
    if scale.numel() == 1:
        return scale.reshape([1] * x.ndim)
    fits = all(size in (1, full) for size, full in zip(reversed(scale.shape), reversed(x.shape), strict=False))
    if fits or not is_blocked(scale, x):
        return scale
    return scale.repeat_interleave(BLOCK, 0)[: x.shape[0]].repeat_interleave(BLOCK, 1)[:, : x.shape[1]]


def _along(per_channel: torch.Tensor, channel_dim: int) -> torch.Tensor:
    """`(1,)`, `(out,)` or `(out, 1, …)` laid along the output's channel dimension (counted from the end)."""
    return per_channel.reshape(-1, *[1] * (-channel_dim - 1))
