"""Reductions: `sum_fp8`, and the scales of dynamic quantization.

These are `calculate_scale_for_cast` and `cast_to_fp8_just_in_time`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .calls import Arguments
from .codes import E4M3
from .device import Device
from .refuse import FP8, HIGH, require, require_dtype

NO_MAX, PER_TENSOR, PER_AXIS = range(3)
NO_ROUNDING, POWER_OF_TWO = range(2)


def _dims(a: Arguments) -> list[int]:
    rank = a.self.dim()
    dims = [*range(rank)] if not a.dim else [*a.dim]
    require(all(-rank <= dim < rank for dim in dims), f"sum_fp8: no dimensions {dims} in a tensor of {rank}")
    return [dim % rank for dim in dims]


def check_sum(a: Arguments, device: Device) -> Tensor:
    require_dtype(a.self, FP8, "sum_fp8: dtype of self")
    out_dtype = a.out_dtype or a.self.dtype
    require(out_dtype in HIGH + FP8, f"sum_fp8: out_dtype must not be {out_dtype}")
    dims, sizes = _dims(a), enumerate(a.self.shape)
    shape = [1 if dim in dims else size for dim, size in sizes if a.keepdim or dim not in dims]
    return a.self.new_empty(shape, dtype=out_dtype)


def sum_fp8(a: Arguments, device: Device) -> Tensor:
    """A sum in float32, rounded once; to FP8 with saturation."""
    total = device.decode(a.self).sum(_dims(a), a.keepdim)
    out_dtype = a.out_dtype or a.self.dtype
    return device.encode(total, out_dtype) if out_dtype in FP8 else total.to(out_dtype)


def check_calculate_scale(a: Arguments, device: Device) -> Tensor:
    require_dtype(a.input, (*HIGH, torch.float16), "calculate_scale_for_cast: dtype of input")
    require(a.maxMode in (NO_MAX, PER_TENSOR, PER_AXIS), f"calculate_scale_for_cast: no maxMode {a.maxMode}")
    require(a.scaleMode in (NO_ROUNDING, POWER_OF_TWO), f"calculate_scale_for_cast: no scaleMode {a.scaleMode}")
    rank, shape = a.input.dim(), [*a.input.shape]
    if a.maxMode == PER_TENSOR:
        shape = [1]
    elif a.maxMode == PER_AXIS:
        axis = a.reduceAxis
        require(-rank <= axis < rank, f"calculate_scale_for_cast: no axis {axis} in a tensor of {rank} dimensions")
        shape[axis % rank : axis % rank + 1] = [1] if a.reduceKeepdim else []
    return a.input.new_empty(shape)


def calculate_scale(a: Arguments, device: Device) -> Tensor:
    """maxabs / (fullscale * backoff), then up to a power of two.

    In the input's dtype throughout: the division is a product with the rounded reciprocal, and the logarithm is
    rounded before it is rounded up. That is what Gaudi cards gave.
    """
    x = a.input
    if a.maxMode == PER_TENSOR:
        x = x.abs().max().reshape(1)
    elif a.maxMode == PER_AXIS:
        x = x.abs().amax(a.reduceAxis, a.reduceKeepdim)
    if a.maxMode != NO_MAX:
        x = x * torch.tensor(1 / (a.fullscale * a.backoff), dtype=torch.float64).to(x.dtype)
    return x if a.scaleMode == NO_ROUNDING else torch.exp2(torch.ceil(torch.log2(x)))


def _scale_shape(a: Arguments) -> tuple[int, ...]:
    height, width = a.block_shape
    return (*a.input.shape[:-2], a.input.shape[-2] // height, a.input.shape[-1] // width)


def check_cast_just_in_time(a: Arguments, device: Device) -> tuple[Tensor, Tensor]:
    require_dtype(a.input, HIGH, "convert_to_fp8_just_in_time: dtype of input")
    out_dtype, scale_dtype = a.out_dtype or E4M3, a.scale_dtype or a.input.dtype
    require(out_dtype in FP8, f"convert_to_fp8_just_in_time: out_dtype must be of FP8, but is {out_dtype}")
    require(scale_dtype in HIGH, f"convert_to_fp8_just_in_time: scale_dtype must be of {[*HIGH]}, not {scale_dtype}")
    require(
        a.input.dim() >= 2,
        f"convert_to_fp8_just_in_time: input tensor must have at least 2 dimensions, got {a.input.dim()}",
    )
    height, width = a.block_shape
    require(
        height == 1 or width == 1 or height == width,
        "convert_to_fp8_just_in_time: block_height and block_width must be equal or one of them must be 1, got "
        f"{height} and {width}",
    )
    require(
        a.input.shape[-2] % height == 0 and a.input.shape[-1] % width == 0,
        "convert_to_fp8_just_in_time: two last dimensions of input tensor must be divisible by block_height and "
        f"block_width, got {[*a.input.shape[-2:]]} and {[height, width]}",
    )
    codes = a.input.new_empty(a.input.shape, dtype=out_dtype)
    return codes, a.input.new_empty(_scale_shape(a), dtype=scale_dtype)


def cast_just_in_time(a: Arguments, device: Device) -> tuple[Tensor, Tensor]:
    """Codes, and the scales s = maxabs / full scale of blocks that codes are multiplied by; a block of zeros: 1."""
    out_dtype, (height, width) = a.out_dtype or E4M3, a.block_shape
    rows, columns = _scale_shape(a)[-2:]
    blocks = a.input.float().reshape(*a.input.shape[:-2], rows, height, columns, width)
    amax = blocks.abs().amax((-3, -1), keepdim=True)
    scale = (amax / device.full_scale(out_dtype)).masked_fill(amax == 0, 1.0)
    scale = scale.to(a.scale_dtype or a.input.dtype)
    codes = device.encode(blocks * (1 / scale.float()), out_dtype)
    return codes.reshape(a.input.shape), scale.reshape(_scale_shape(a))
