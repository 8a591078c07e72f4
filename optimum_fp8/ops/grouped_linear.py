"""Products of rows, each with the FP8 weight of its own expert: schema, fake kernel and the function to call."""

from __future__ import annotations

from typing import Any

import torch

from . import reference_grouped
from .arguments import GroupedLinearCall
from .declare import call, declare
from .dynamic import DynamicScale
from .records import CallRecord


def grouped_linear(
    x: torch.Tensor,
    experts: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    input_scale: torch.Tensor | DynamicScale | None = None,
    bias: torch.Tensor | None = None,
    *,
    full_scale: float,
    arithmetic: str = "fused",
    record: CallRecord | None = None,
) -> torch.Tensor:
    """Each row of `x` is multiplied with the weight of its expert: what `linear` gives for that row and that weight.

    Args:
        x: `[N, in]`, bfloat16, float16 or float32: a row for each pair of a token and one of its experts, in any order.
        experts: `[N]`, integers: which weight each row is multiplied with. Rows of others than 0 … E - 1 (under expert
            parallelism they are another process's) give zeros.
        weight: `[E, out, in]`, FP8.
        weight_scale: float32, one an expert `(E, 1, 1)`, one for each half of its rows, gate and up, `(E, 2, 1)`, one
            an output `(E, out, 1)`, by blocks `(E, ⌈out/128⌉, ⌈in/128⌉)`, or by groups along the input
            `(E, out, ⌈in/g⌉)` with g of 128 or 32. `(E, 2, 1)` are halves.
        input_scale: float32, `(1,)`, one an expert `(E, 1, 1)`, one a row `(N, 1)`, or by groups along the input
            `(N, ⌈in/g⌉)` with g of 128 or 32, or a `DynamicScale`; None leaves `x` in high precision (weight-only).
        bias: `[E, out]` or None.
        full_scale: the value activations saturate at.
        arithmetic: one of `ARITHMETICS`.
        record: counts the call for the module that makes it.

    Returns:
        `[N, out]` in `x`'s dtype.

    Raises:
        FP8OperandError: `x`, `experts`, `weight` and `bias` do not fit one another.
        FP8ScaleError: a scale does not fit what it belongs to.
        FP8ConfigError: an unknown arithmetic, or a full scale that codes do not reach.
    """
    scale: Any = input_scale  # `call` finds it where it is a rule
    operands = (x, experts, weight, weight_scale, scale, bias)
    return call("grouped_linear", GroupedLinearCall(*operands, full_scale, arithmetic), record)


def _fake(call: GroupedLinearCall) -> torch.Tensor:
    return call.x.new_empty((call.x.shape[0], call.weight.shape[1]))


declare(
    "grouped_linear",
    "(Tensor x, Tensor experts, Tensor weight, Tensor weight_scale, Tensor? input_scale, Tensor? bias, "
    "float full_scale, str arithmetic) -> Tensor",
    GroupedLinearCall,
    _fake,
    reference_grouped.grouped_linear,
    attributed_by=("weight",),
    gradient=("x", "bias"),
)
