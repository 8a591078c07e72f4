"""The product with an FP8 weight: schema, fake kernel and the function to call."""

from __future__ import annotations

import torch

from . import reference
from .arguments import LinearCall
from .declare import call, declare
from .records import CallRecord


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    input_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    *,
    full_scale: float,
    arithmetic: str = "fused",
    record: CallRecord | None = None,
) -> torch.Tensor:
    """y = (x_q · s_x)(w_q · s_w)ᵀ + bias with float32 accumulation; `reference.py` says where it rounds.

    Args:
        x: `[…, in]`, bfloat16, float16 or float32.
        weight: `[out, in]`, FP8.
        weight_scale: float32, `(1,)`, `(out, 1)`, by blocks `(⌈out/128⌉, ⌈in/128⌉)`, or by groups along the input
            `(out, ⌈in/g⌉)` with g of 128 or 32.
        input_scale: float32, `(1,)`, `[…, 1]`, or by groups `[…, ⌈in/g⌉]` with g of 128 or 32; None leaves `x` in high
            precision (weight-only).
        bias: `(out,)` or None.
        full_scale: the value activations saturate at.
        arithmetic: one of `ARITHMETICS`.
        record: counts the call for the module that makes it.

    Returns:
        `[…, out]` in `x`'s dtype.

    Raises:
        FP8OperandError: `x`, `weight` and `bias` do not fit one another.
        FP8ScaleError: a scale does not fit what it belongs to.
        FP8ConfigError: an unknown arithmetic, or a full scale that codes do not reach.
    """
    return call("linear", LinearCall(x, weight, weight_scale, input_scale, bias, full_scale, arithmetic), record)


def _fake(call: LinearCall) -> torch.Tensor:
    return call.x.new_empty((*call.x.shape[:-1], call.weight.shape[0]))


declare(
    "linear",
    "(Tensor x, Tensor weight, Tensor weight_scale, Tensor? input_scale, Tensor? bias, float full_scale, "
    "str arithmetic) -> Tensor",
    LinearCall,
    _fake,
    reference.linear,
    attributed_by=("weight",),
)
