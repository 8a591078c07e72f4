"""`matmul` on Gaudi: casts of what is not codes yet, and a product of codes.

Where an operand is not rounded, or has a scale for each of the positions that the product sums over, there is no FP8
product: codes are dequantized to float32, and the product is one of float32.
"""

from __future__ import annotations

import torch

from ...formats import is_fp8
from ..arguments import MatmulCall
from ..operands import HIGH_PRECISION, broadcasts
from ..reference import ARITHMETICS
from .casts import WIDE, codes_of, dequantize, quantize, refuses_full_scale
from .gemm import gemm


def refuses(call: MatmulCall) -> str | None:
    a, b = call.a, call.b
    if a.dtype not in HIGH_PRECISION or (b.dtype not in HIGH_PRECISION and b.dtype != call.dtype):
        return f"a product of {a.dtype} and {b.dtype}"
    if a.ndim < 2 or b.ndim < 2 or a.shape[-1] != b.shape[-2]:
        return f"operands of {tuple(a.shape)} and {tuple(b.shape)}"
    if is_fp8(b.dtype) and call.b_scale is None:
        return "codes without their scale"
    if call.arithmetic not in ARITHMETICS:
        return "unknown arithmetic"
    for x, scale, summed in ((a, call.a_scale, -1), (b, call.b_scale, None)):
        if scale is None:
            continue
        along = scale.ndim > 1 and summed is not None and scale.shape[summed] > 1
        if along or (scale.numel() != 1 and not broadcasts(scale, x)) or _varies_twice(scale):
            return f"scales of {tuple(scale.shape)} for an operand of {tuple(x.shape)}"
    return refuses_full_scale(a, call.dtype, call.full_scale)


def _varies_twice(scale: torch.Tensor) -> bool:
    return scale.ndim > 1 and scale.shape[-1] > 1 and scale.shape[-2] > 1


def run(call: MatmulCall) -> torch.Tensor:
    return product(call, call.a.dtype)


def product(call: MatmulCall, dtype: torch.dtype) -> torch.Tensor:
    """The product rounded once, to `dtype`; both operands may be codes, and in "qdq" are dequantized to it."""
    a, b, a_scale, b_scale = call.a, call.b, call.a_scale, call.b_scale
    if call.arithmetic == "qdq":
        return torch.matmul(_rounded_back(call, a, a_scale, dtype), _rounded_back(call, b, b_scale, dtype))
    by_rows = b_scale is not None and b_scale.ndim > 1 and b_scale.shape[-2] > 1
    if a_scale is None or b_scale is None or by_rows:
        return _high_precision(call, by_rows).to(dtype)
    wide = dtype if dtype in WIDE else torch.float32
    return gemm(_codes(call, a, a_scale), _codes(call, b, b_scale), a_scale, b_scale, wide).to(dtype)


def _codes(call: MatmulCall, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Codes with the strides of `x`: a transposed operand is cast as it lies in memory."""
    if not is_fp8(x.dtype) and not x.is_contiguous() and x.mT.is_contiguous():
        return quantize(x.mT, scale.mT if scale.ndim > 1 else scale, call.dtype, call.full_scale).mT
    return codes_of(x, scale, call.dtype, call.full_scale)


def _rounded_back(call: MatmulCall, x: torch.Tensor, scale: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    return x if scale is None else dequantize(_codes(call, x, scale), scale, dtype)


def _high_precision(call: MatmulCall, by_rows: bool) -> torch.Tensor:
    left, right = _values(call, call.a, call.a_scale), _values(call, call.b, call.b_scale, by_rows)
    result = torch.matmul(left, right)
    for scale in (call.a_scale, None if by_rows else call.b_scale):
        result = result if scale is None else result * scale
    return result


def _values(call: MatmulCall, x: torch.Tensor, scale: torch.Tensor | None, scaled: bool = False) -> torch.Tensor:
    """An operand in float32: as it is, or rounded to codes, times their scale if that cannot follow the product."""
    if scale is None:
        return x.float()
    return dequantize(_codes(call, x, scale), scale if scaled else None, torch.float32)
