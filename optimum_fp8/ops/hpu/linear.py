"""`linear` on Gaudi: a cast and a product of codes; the bias is added afterwards, where the arithmetic says.

Without a scale of the input (weight-only) there is no FP8 product. The product is then one of float32, or of bfloat16
where that gives the same: with a known constant scale, a power of two, which leaves a weight exact.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ...formats import is_fp8
from ..arguments import LinearCall
from ..constants import constant_of
from ..operands import BLOCK, HIGH_PRECISION, block_of, group_of, is_along_input, is_per_channel
from ..reference import ARITHMETICS, with_bias
from .casts import WIDE, dequantize, quantize, refuses_full_scale
from .gemm import gemm, takes_blocks


def refuses(call: LinearCall) -> str | None:
    x, weight, bias, scale = call.x, call.weight, call.bias, call.input_scale
    if x.dtype not in HIGH_PRECISION or not is_fp8(weight.dtype):
        return f"inputs in {x.dtype} with weights in {weight.dtype}"
    if weight.ndim != 2 or x.ndim == 0 or x.shape[-1] != weight.shape[1]:
        return f"an input of {tuple(x.shape)} with weights of {tuple(weight.shape)}"
    if bias is not None and bias.shape != (weight.shape[0],):
        return f"a bias of {tuple(bias.shape)}"
    if call.arithmetic not in ARITHMETICS:
        return "unknown arithmetic"
    weight_scale = call.weight_scale
    if not (weight_scale.numel() == 1 or is_per_channel(weight_scale, weight) or is_along_input(weight_scale, weight)):
        return f"weight scales of {tuple(weight_scale.shape)} for a weight of {tuple(weight.shape)}"
    if scale is None:
        return None
    if scale.numel() != 1 and scale.shape != (*x.shape[:-1], 1) and not group_of(scale, x):
        return f"input scales of {tuple(scale.shape)} for an input of {tuple(x.shape)}"
    return refuses_full_scale(x, weight.dtype, call.full_scale) or _refuses_blocks(call, scale)


def _refuses_blocks(call: LinearCall, input_scale: torch.Tensor) -> str | None:
    """Why a product cannot take scales that change along what it sums over."""
    group = _block(call, input_scale)
    if call.arithmetic == "qdq" or not group:
        return None
    if not takes_blocks():
        return "scales by blocks or groups: fp8_gemm_v2 takes none in this bridge"
    fits = call.weight_scale.numel() == 1 or block_of(call.weight_scale, call.weight) == group
    if not fits or any(size % group for size in call.weight.shape):
        return (
            f"scales of {tuple(call.weight_scale.shape)} and {tuple(input_scale.shape)}: fp8_gemm_v2 takes groups of "
            "the input with whole square blocks of the weight"
        )
    return None


def _block(call: LinearCall, input_scale: torch.Tensor) -> int:
    """How many values along the input share scales in a product by blocks; 0: scales follow the product."""
    return group_of(input_scale, call.x) or (BLOCK if is_along_input(call.weight_scale, call.weight) else 0)


def run(call: LinearCall) -> torch.Tensor:
    if call.arithmetic == "qdq":
        return _qdq(call)
    dtype = call.x.dtype
    if dtype not in WIDE or (call.arithmetic == "fused" and call.bias is not None):
        dtype = torch.float32  # not rounded before the bias is added
    product = _weight_only(call, dtype) if call.input_scale is None else _product(call, call.input_scale, dtype)
    return with_bias(product, call.bias, call.x.dtype, call.arithmetic)


def _qdq(call: LinearCall) -> torch.Tensor:
    x, dtype, scale = call.x, call.x.dtype, call.input_scale
    if scale is not None:
        x = dequantize(quantize(x, scale, call.weight.dtype, call.full_scale), scale, dtype)
    weight = dequantize(call.weight, call.weight_scale, dtype)
    return F.linear(x, weight, None if call.bias is None else call.bias.to(dtype))


def _weight_only(call: LinearCall, dtype: torch.dtype) -> torch.Tensor:
    weight, scale = call.weight, call.weight_scale
    if dtype == torch.bfloat16 and constant_of(scale) is not None:
        return F.linear(call.x, dequantize(weight, scale, dtype))
    if is_along_input(scale, weight):
        return F.linear(call.x.float(), dequantize(weight, scale, torch.float32))
    return F.linear(call.x.float(), dequantize(weight, None, torch.float32)) * scale.reshape(-1)


def _product(call: LinearCall, input_scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    x, weight, weight_scale = call.x, call.weight, call.weight_scale
    codes = quantize(x, input_scale, weight.dtype, call.full_scale)
    if group := _block(call, input_scale):
        out, size = weight.shape
        input_scale = input_scale.expand(*x.shape[:-1], size // group).contiguous()
        weight_scale = weight_scale.expand(out // group, size // group).t().contiguous()
    elif weight_scale.ndim > 1:
        weight_scale = weight_scale.reshape(-1)
    return gemm(codes, weight.t(), input_scale, weight_scale, dtype)
