"""Casts to and from FP8: `cast_to_fp8_v2`, `cast_to_fp8_hybrid` and `cast_from_fp8`."""

from __future__ import annotations

import torch
from torch import Tensor

from .calls import Arguments
from .codes import E4M3, E5M2
from .device import Device
from .refuse import FP8, HIGH, require, require_broadcast, require_dtype, shaped_scale


def _amax(x: Tensor, wanted: bool) -> Tensor:
    """The largest magnitude before scaling; float32 [], or [0] where it is not wanted."""
    return x.abs().max().to(torch.float32) if wanted else x.new_empty(0, dtype=torch.float32)


def _empty_amax(x: Tensor, wanted: bool) -> Tensor:
    return x.new_empty(() if wanted else 0, dtype=torch.float32)


def _scale(a: Arguments) -> Tensor | None:
    scale = shaped_scale(a.scale, a.scale_shape, a.input)
    if scale is not None and scale.numel() != 1:
        require_broadcast(scale, a.input.shape, "scale")
    return scale


def _scaled(x: Tensor, scale: Tensor | None) -> Tensor:
    """A product with a scale in float32, of x's shape even where the scale has more dimensions of size one."""
    return x if scale is None else (x * scale).reshape(x.shape)


def check_cast_to(a: Arguments, device: Device) -> tuple[Tensor, Tensor]:
    require(
        a.input.dtype in HIGH + FP8,
        "CastToFp8V2 input dtype must be one of [float, bfloat16, float8_e5m2, float8_e4m3fn].",
    )
    require(a.dtype in FP8, f"CastToFp8V2 dtype must be one of [float8_e5m2, float8_e4m3fn], but is {a.dtype}")
    if a.input.dtype in FP8:
        require(not a.is_amax, "CastToFp8V2 must have no amax for float8.")
        require(
            a.input.dtype == a.dtype,
            f"CastToFp8V2 input and output must have the same dtype for float8, but are {a.input.dtype} and {a.dtype}",
        )
    _scale(a)
    return a.input.new_empty(a.input.shape, dtype=a.dtype), _empty_amax(a.input, a.is_amax)


def cast_to(a: Arguments, device: Device) -> tuple[Tensor, Tensor]:
    """sat(round(input * scale)): the scale is 1/s."""
    x = device.decode(a.input) if a.input.dtype in FP8 else a.input.float()
    return device.encode(_scaled(x, _scale(a)), a.dtype, a.stochastic_rounding), _amax(x, a.is_amax)


def check_cast_to_hybrid(a: Arguments, device: Device) -> tuple[Tensor, Tensor, Tensor]:
    require_dtype(a.input, HIGH, "cast_to_fp8_hybrid: input")
    for scale in (a.scale_152, a.scale_143):
        if scale is not None and scale.numel() != 1:
            require_broadcast(scale, a.input.shape, "cast_to_fp8_hybrid: scale")
    outputs = [a.input.new_empty(a.input.shape, dtype=dtype) for dtype in (E5M2, E4M3)]
    return outputs[0], outputs[1], _empty_amax(a.input, a.is_amax)


def cast_to_hybrid(a: Arguments, device: Device) -> tuple[Tensor, Tensor, Tensor]:
    """Both formats in one pass; only that of E5M2 may be rounded stochastically."""
    x = a.input.float()
    scales = [None if scale is None else scale.float() for scale in (a.scale_152, a.scale_143)]
    wide = device.encode(_scaled(x, scales[0]), E5M2, a.stochastic_rounding)
    return wide, device.encode(_scaled(x, scales[1]), E4M3), _amax(x, a.is_amax)


def check_cast_from(a: Arguments, device: Device) -> Tensor:
    require_dtype(a.input, FP8, "CastFromFp8 input dtype")
    require(a.out_dtype in HIGH, "CastFromFp8 output dtype must be equal to float or bfloat16.")
    _scale(a)
    return a.input.new_empty(a.input.shape, dtype=a.out_dtype)


def cast_from(a: Arguments, device: Device) -> Tensor:
    """input * scale: the scale is s. One rounding, to the output dtype."""
    return _scaled(device.decode(a.input), _scale(a)).to(a.out_dtype)
