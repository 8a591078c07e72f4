"""The reference: plain torch that defines the result of every operator, down to each rounding, on any device.

All products are formed from FP8 values held in float32 and accumulated in float32; `1/s` is taken in float32. Where
the other roundings fall is the `arithmetic`:

* "fused": product times scales plus bias in float32, then one rounding to the output dtype.
* "gaudi": the product times scales is rounded to the output dtype, then the bias is added in that dtype, as INC and
  the cards do (a bias inside the GEMM would block fusing the next cast).
* "qdq": both operands are dequantized to the input's dtype, then an ordinary operator of that dtype runs.

Scales that change along what a product sums over (by blocks or by groups) cannot be multiplied in after it: there each
operand with such a scale is dequantized in float32, codes times scale, and the product is formed of these values, again
with float32 accumulation and the roundings of the `arithmetic`. Other scales of the same product stay where they were.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from ..errors import FP8ConfigError, FP8OperandError, FP8ScaleError, nearest
from ..formats import FP8_DTYPES, is_fp8, number_format
from ..rounding import scale_from_maxabs
from .arguments import ConvCall, EmbeddingCall, LinearCall, Product
from .operands import (
    BIN_SHIFT,
    BINS,
    broadcast_scale,
    channels_last_of,
    check_weight_scale,
    group_of,
    group_shape,
    in_out_swapped,
    is_along_input,
    is_per_channel,
)
from .straight_through import StraightThrough, is_straight_through

ARITHMETICS = ("fused", "gaudi", "qdq")
_CHUNK_ELEMENTS = 1 << 20  # cast at a time: bounds the float32 working copy at 4 MiB


def cast_to_fp8(x: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype, full_scale: float) -> torch.Tensor:
    _check_format(dtype, full_scale)
    if is_straight_through():
        return StraightThrough.apply(x, scale, full_scale, lambda x: _codes(x, scale, dtype, full_scale))
    return _codes(x, scale, dtype, full_scale)


def _codes(x: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype, full_scale: float) -> torch.Tensor:
    scale = broadcast_scale(scale, x).float()
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


def cast_to_fp8_by_range(
    x: torch.Tensor, scale_of_range: torch.Tensor, per_row: bool, dtype: torch.dtype, full_scale: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    scale, found = scale_by_range(x, scale_of_range, per_row)
    return cast_to_fp8(x.contiguous(), scale, dtype, full_scale), scale, found


def scale_by_range(x: torch.Tensor, scale_of_range: torch.Tensor, per_row: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The scale that `cast_to_fp8_by_range` casts with, and the range that it follows from."""
    rows = x.reshape(x.shape[0], -1) if per_row else x
    found = maxabs(rows, -1).reshape(-1, *[1] * (x.ndim - 1)) if per_row else maxabs(x, 0)
    bits = found.to(torch.bfloat16).view(torch.int16).long()
    return scale_of_range[torch.where(found.isnan(), 0x7FC0, bits)], found


def cast_from_fp8(x: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return (x.float() * broadcast_scale(scale, x).float()).to(dtype)


def maxabs(x: torch.Tensor, group: int) -> torch.Tensor:
    shape = group_shape(x.shape, group)
    if x.numel() == 0:
        return torch.zeros(shape, dtype=torch.float32, device=x.device)
    magnitudes = x.abs()
    if group == 0:
        return magnitudes.amax().reshape(1).float()
    if group > 0 and x.ndim:
        filled = F.pad(magnitudes, (0, shape[-1] * group - x.shape[-1]))
        return filled.unflatten(-1, (shape[-1], group)).amax(dim=-1).float()
    return magnitudes.amax(dim=-1, keepdim=True).reshape(shape).float()


def histogram(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    counts = torch.zeros(BINS, dtype=torch.int64, device=x.device)
    for part in x.flatten().split(_CHUNK_ELEMENTS):
        bins = (part.float().view(torch.int32) & 0x7FFFFFFF) >> BIN_SHIFT
        counts.index_add_(0, bins, torch.ones_like(bins, dtype=torch.int64))  # bincount would wait for the device
    return counts, maxabs(x, 0)


def dynamic_scale(
    x: torch.Tensor, group: int, divisor: float, rounding: str, fp8_config: str, target: str, hp_dtype: torch.dtype
) -> torch.Tensor:
    fmt = number_format(fp8_config, target)
    ranges = maxabs(x.where(x.isfinite(), 0), group).to(x.dtype)
    if x.numel() == 0:
        return torch.ones_like(ranges, dtype=torch.float32)
    return scale_from_maxabs(ranges, divisor, rounding, fmt, hp_dtype, reciprocal=fmt.is_gaudi and group == 0)


def linear(call: LinearCall) -> torch.Tensor:
    _check_linear(call)
    return _apply(F.linear, call, call.weight_scale.reshape(-1), lambda per_channel: per_channel.reshape(-1))


def conv(call: ConvCall) -> torch.Tensor:
    check_conv(call)

    def product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return convolve(call, x, weight, bias)

    return _apply(product, call, call.weight_scale, lambda per_channel: along_channels(call, per_channel))


def convolve(call: ConvCall, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """torch's own convolution of `x` and `weight`, `[out, in / groups, k…]`, with the geometry of `call`."""
    if call.transposed:
        form = channels_last_of(weight) or torch.contiguous_format
        weight = in_out_swapped(weight, call.groups).contiguous(memory_format=form)
    batched = x if x.ndim == weight.ndim else x.unsqueeze(0)
    geometry = (call.stride, call.padding, call.dilation, call.transposed, call.output_padding, call.groups)
    result = torch.convolution(batched, weight, bias, *geometry)
    return result if x.ndim == weight.ndim else result.squeeze(0)


def along_channels(call: ConvCall, per_channel: torch.Tensor) -> torch.Tensor:
    """One value, or one for each output channel, laid along the output's channels."""
    return per_channel.reshape(-1, *[1] * (call.weight.ndim - 2))


def embedding(call: EmbeddingCall) -> torch.Tensor:
    check_embedding(call)
    codes, scale = rows_of(call)
    return cast_from_fp8(codes, scale, call.dtype).reshape(*call.x.shape, call.weight.shape[1])


def rows_of(call: EmbeddingCall) -> tuple[torch.Tensor, torch.Tensor]:
    """The codes `[n, size]` that an embedding asks for, and their scale, `(1,)` or `(n, 1)`."""
    places, scale = call.x.flatten(), call.weight_scale
    codes = F.embedding(places, call.weight.view(torch.uint8)).view(call.weight.dtype)
    return codes, scale.reshape(1) if scale.numel() == 1 else F.embedding(places, scale)


def check_embedding(call: EmbeddingCall) -> None:
    """Refuse operands of an embedding that do not belong together.

    Raises:
        FP8OperandError: names what was found and expected.
        FP8ScaleError: the scale does not fit the table.
    """
    x, weight, scale = call.x, call.weight, call.weight_scale
    if x.dtype not in (torch.int64, torch.int32) or not is_fp8(weight.dtype) or weight.ndim != 2:
        raise FP8OperandError(
            f"embedding: indices in {x.dtype} and a table of shape {tuple(weight.shape)} in {weight.dtype}: expected "
            "int64 or int32, and (rows, size) in FP8"
        )
    if scale.numel() != 1 and scale.shape != (weight.shape[0], 1):
        raise FP8ScaleError(
            f"embedding: a scale of shape {tuple(scale.shape)} for a table of shape {tuple(weight.shape)}: expected "
            f"(1,) or ({weight.shape[0]}, 1), one for each row"
        )


def _check_dtypes(op: str, x: torch.Tensor, weight: torch.Tensor) -> None:
    if is_fp8(x.dtype) or not x.is_floating_point() or not is_fp8(weight.dtype):
        raise FP8OperandError(
            f"{op}: an input in {x.dtype} and a weight in {weight.dtype}: expected an input in high precision and a "
            "weight in FP8 (codes that are held as bytes are seen as FP8 by .view(dtype))"
        )


def _check_bias(op: str, bias: torch.Tensor | None, weight: torch.Tensor, out: int) -> None:
    if bias is not None and bias.shape != (out,):
        raise FP8OperandError(
            f"{op}: a bias of shape {tuple(bias.shape)} for a weight of shape {tuple(weight.shape)}: expected "
            f"({out},), one value for each output"
        )


def _check_linear(call: LinearCall) -> None:
    """Refuse operands of a linear layer that do not belong together.

    Raises:
        FP8OperandError: names what was found and expected.
        FP8ScaleError: a scale does not fit the weight, or the input.
    """
    x, weight, scale = call.x, call.weight, call.input_scale
    _check_dtypes("linear", x, weight)
    if weight.ndim != 2 or x.ndim == 0 or x.shape[-1] != weight.shape[1]:
        raise FP8OperandError(
            f"linear: an input of shape {tuple(x.shape)} and a weight of shape {tuple(weight.shape)}: expected "
            "(…, in) and (out, in); a weight stored as (in, out) has to be transposed"
        )
    _check_bias("linear", call.bias, weight, weight.shape[0])
    check_weight_scale(call.weight_scale, weight)
    if scale is not None and scale.numel() != 1 and scale.shape != (*x.shape[:-1], 1) and not group_of(scale, x):
        raise FP8ScaleError(
            f"linear: an input scale of shape {tuple(scale.shape)} for an input of shape {tuple(x.shape)}: "
            f"expected (1,) or {(*x.shape[:-1], 1)}, one for each row, or one for each 128 or 32 values of a row"
        )


def check_conv(call: ConvCall) -> None:
    """Refuse operands of a convolution that do not belong together.

    Raises:
        FP8OperandError: names what was found and expected.
        FP8ScaleError: a scale does not fit the weight, or the input's is not one for all.
    """
    x, weight = call.x, call.weight
    _check_dtypes("conv", x, weight)
    channels = weight.shape[1] * call.groups if weight.ndim > 1 else 0
    if (
        not 3 <= weight.ndim <= 5
        or x.ndim not in (weight.ndim - 1, weight.ndim)
        or x.shape[1 - weight.ndim] != channels
    ):
        raise FP8OperandError(
            f"conv: an input of shape {tuple(x.shape)} and a weight of shape {tuple(weight.shape)} in {call.groups} "
            f"groups: expected (N, C, …) or (C, …) with {channels} channels, and a weight of 1 to 3 spatial dimensions"
        )
    _check_bias("conv", call.bias, weight, weight.shape[0])
    scale = call.weight_scale
    if scale.numel() != 1 and not is_per_channel(scale, weight):
        raise FP8ScaleError(
            f"conv: a scale of shape {tuple(scale.shape)} does not fit a weight of shape {tuple(weight.shape)}: "
            f"expected (1,) or {(weight.shape[0], *[1] * (weight.ndim - 1))}, one for each output channel"
        )
    if call.input_scale is not None and call.input_scale.numel() != 1:
        raise FP8ScaleError(f"conv: an input scale of shape {tuple(call.input_scale.shape)}: expected (1,)")


def _apply(
    product: Callable[..., torch.Tensor],
    call: Product,
    channel_scale: torch.Tensor,
    along_channels: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """Round the operands, multiply them with `product`, and round the result where `arithmetic` says.

    A scale that changes along what is summed over is multiplied with its codes in float32, before the product; all
    others with the product's result.
    """
    x, weight, weight_scale, input_scale, bias, arithmetic = *call[:5], call.arithmetic
    if arithmetic not in ARITHMETICS:
        raise FP8ConfigError(f"arithmetic={arithmetic!r} is unknown: {nearest(arithmetic, ARITHMETICS)}")
    if arithmetic == "qdq":
        if input_scale is not None:
            x = cast_from_fp8(cast_to_fp8(x, input_scale, weight.dtype, call.full_scale), input_scale, x.dtype)
        return product(x, cast_from_fp8(weight, weight_scale, x.dtype), None if bias is None else bias.to(x.dtype))
    codes, values, scale = x.float(), weight.float(), along_channels(channel_scale)
    if is_along_input(weight_scale, weight):
        values, scale = values * broadcast_scale(weight_scale, weight), torch.ones(1, device=weight.device)
    if input_scale is not None:
        codes = cast_to_fp8(x, input_scale, weight.dtype, call.full_scale).float()
        if group_of(input_scale, x):
            codes = codes * broadcast_scale(input_scale, x)
        else:
            scale = input_scale * scale
    return with_bias(
        product(codes, values) * scale, None if bias is None else along_channels(bias), x.dtype, arithmetic
    )


def with_bias(result: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype, arithmetic: str) -> torch.Tensor:
    """The float32 result of a product, with its bias, rounded to `dtype` where "fused" or "gaudi" arithmetic does."""
    if bias is None:
        return result.to(dtype)
    if arithmetic == "gaudi":
        return result.to(dtype) + bias.to(dtype)
    return (result + bias.float()).to(dtype)
