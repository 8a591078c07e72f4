"""Casts on Gaudi: `cast_to_fp8_v2` multiplies by 1/s, `cast_from_fp8` by s."""

from __future__ import annotations

import torch

from ..arguments import CastFromCall, CastToCall
from ..constants import constant_of
from ..operands import broadcasts, refuses_format
from .bridge import operator

_INPUTS, _OUTPUTS = (torch.bfloat16, torch.float32), (torch.bfloat16, torch.float32)


def refuses_cast_to(call: CastToCall) -> str | None:
    if call.x.dtype not in (*_INPUTS, call.dtype):
        return f"a cast of {call.x.dtype}"
    return refuses_format(call.dtype, call.full_scale) or _refuses_scale(call.x, call.scale)


def refuses_cast_from(call: CastFromCall) -> str | None:
    if call.dtype not in _OUTPUTS:
        return f"a cast to {call.dtype}"
    return _refuses_scale(call.x, call.scale)


def _refuses_scale(x: torch.Tensor, scale: torch.Tensor) -> str | None:
    if scale.numel() == 1 or broadcasts(scale, x):
        return None
    return f"scales of {tuple(scale.shape)} for {tuple(x.shape)}"


def cast_to(call: CastToCall) -> torch.Tensor:
    return quantize(call.x, call.scale, call.dtype)


def cast_from(call: CastFromCall) -> torch.Tensor:
    return dequantize(call.x, call.scale, call.dtype)


def quantize(x: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Codes of `x / scale`; the operator is given 1/s, as a number where it is a known constant."""
    constant = constant_of(scale)
    if constant is not None:
        return operator("cast_to_fp8_v2", "scalar")(x, 1.0 / constant, False, False, dtype)[0]
    return operator("cast_to_fp8_v2")(x, scale.reciprocal(), False, False, dtype)[0]


def dequantize(codes: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`codes · scale` in `dtype`; the operator is given s, as a number where it is a known constant."""
    constant = constant_of(scale)
    if constant is not None:
        return operator("cast_from_fp8", "scalar")(codes, constant, dtype)
    return operator("cast_from_fp8")(codes, scale, dtype)
