"""Casts on Gaudi: `cast_to_fp8_v2` multiplies by 1/s, `cast_from_fp8` by s."""

from __future__ import annotations

import torch

from ...errors import FP8NotAvailableError
from ...formats import FP8_DTYPES, TARGETS, is_fp8, number_format
from ..arguments import CastFromCall, CastToCall
from ..constants import constant_of, inverse_of
from ..operands import HIGH_PRECISION, block_of, broadcast_scale, broadcasts, group_of, refuses_format
from .bridge import full_scale as largest
from .bridge import operator

WIDE = (torch.bfloat16, torch.float32)  # what Gaudi's operators take and give beside FP8
_FULL_SCALES = {
    dtype: frozenset(number_format(name, target).full_scale for target in TARGETS) for name, dtype in FP8_DTYPES.items()
}


def refuses_cast_to(call: CastToCall) -> str | None:
    if call.x.dtype not in HIGH_PRECISION and call.x.dtype != call.dtype:
        return f"a cast of {call.x.dtype}"
    return refuses_full_scale(call.x, call.dtype, call.full_scale) or refuses_scale(call.x, call.scale)


def refuses_cast_from(call: CastFromCall) -> str | None:
    if call.dtype not in HIGH_PRECISION:
        return f"a cast to {call.dtype}"
    return refuses_scale(call.x, call.scale)


def refuses_scale(x: torch.Tensor, scale: torch.Tensor) -> str | None:
    if scale.numel() == 1 or broadcasts(scale, x) or block_of(scale, x) or group_of(scale, x):
        return None
    return f"scales of {tuple(scale.shape)} for {tuple(x.shape)}"


def refuses_full_scale(x: torch.Tensor, dtype: torch.dtype, full_scale: float) -> str | None:
    """Why `x` cannot be cast so that it saturates at a full scale; None: it can.

    Raises:
        FP8NotAvailableError: the card has no such codes, and would read those of weights as Inf.
    """
    if (reason := refuses_format(dtype, full_scale)) is not None:
        return reason
    if full_scale > largest(dtype):
        raise FP8NotAvailableError(
            f"codes of {dtype} up to {full_scale:g} on a card that reads those above {largest(dtype):g} as Inf: "
            'quantize for target "gaudi2", or load the checkpoint with it'
        )
    if full_scale < largest(dtype) and (is_fp8(x.dtype) or full_scale not in _FULL_SCALES[dtype]):
        return f"casts of {x.dtype} to {dtype} that saturate at {full_scale}"
    return None


def cast_to(call: CastToCall) -> torch.Tensor:
    return quantize(call.x, call.scale, call.dtype, call.full_scale)


def cast_from(call: CastFromCall) -> torch.Tensor:
    return dequantize(call.x, call.scale, call.dtype)


def quantize(x: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype, full_scale: float) -> torch.Tensor:
    """Codes of `x / scale`; the operator is given 1/s, as a number where it is a known constant."""
    x, scale, constant = _wide(x), spread(scale, x), constant_of(scale)
    if full_scale < largest(dtype):
        x = _saturated(x, scale if constant is None else constant, full_scale)
    if constant is not None:
        return operator("cast_to_fp8_v2", "scalar")(x, 1.0 / constant, False, False, dtype)[0]
    return operator("cast_to_fp8_v2")(x, inverse_of(scale), False, False, dtype)[0]


def codes_of(x: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype, full_scale: float) -> torch.Tensor:
    """`x` in FP8: as it is, if it is the codes of a cache, else rounded with its scale."""
    return x if is_fp8(x.dtype) else quantize(x, scale, dtype, full_scale)


def dequantize(codes: torch.Tensor, scale: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """`codes · scale` in `dtype`; the operator is given s, as a number where it is a known constant. None: no scale."""
    scale = None if scale is None else spread(scale, codes)
    constant, wide = constant_of(scale), dtype if dtype in WIDE else torch.float32
    if constant is not None:
        return operator("cast_from_fp8", "scalar")(codes, constant, wide).to(dtype)
    return operator("cast_from_fp8")(codes, scale, wide).to(dtype)


def spread(scale: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """A scale that broadcasts to `x`: those of blocks and groups are repeated over their values."""
    return scale if scale.numel() == 1 else broadcast_scale(scale, x)


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x.float() if x.dtype == torch.float16 else x


def _saturated(x: torch.Tensor, scale: torch.Tensor | float, full_scale: float) -> torch.Tensor:
    """`x` between ±full_scale · scale, for a card whose codes go further.

    The bounds may be rounded to `x`'s dtype: their codes, of the full scale, are far from the next.
    """
    bound = scale * full_scale
    if not isinstance(bound, torch.Tensor):
        return x.clamp(-bound, bound)
    bound = bound.to(x.dtype)
    return x.clamp(-bound, bound)
