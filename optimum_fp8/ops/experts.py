"""A mixture of experts with FP8 weights: schema, fake kernel and the function to call."""

from __future__ import annotations

from typing import Any

import torch

from . import reference_experts
from .arguments import ExpertsCall
from .declare import call, declare
from .dynamic import DynamicScale
from .records import CallRecord


def experts(
    x: torch.Tensor,
    table: torch.Tensor,
    router_weights: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    gate_up_scale: torch.Tensor,
    down_scale: torch.Tensor,
    input_scale: torch.Tensor | DynamicScale | None,
    intermediate_scale: torch.Tensor | None,
    *,
    activation: str = "silu",
    experts_min: int = 0,
    full_scale: float,
    arithmetic: str = "fused",
    record: CallRecord | None = None,
) -> torch.Tensor:
    """Σ over a token's experts of weight · down(act(gate(x)) · up(x)); `reference_experts.py` says where it rounds.

    Args:
        x: `[tokens, hidden]`, bfloat16, float16 or float32.
        table: `[tokens, k]`, integers: the experts of each token. Others than those that are here contribute nothing:
            under expert parallelism they are another process's.
        router_weights: `[tokens, k]`, floats: what the outputs of a token's experts are multiplied by. An expert that
            occurs twice has the sum.
        gate_up: `[E, 2 · inner, hidden]`, FP8: of each expert the gate, then the up projection.
        down: `[E, hidden, inner]`, FP8.
        gate_up_scale: float32, one an expert `(E, 1, 1)`, one for each half `(E, 2, 1)`, or one an output channel
            `(E, 2 · inner, 1)`.
        down_scale: float32, `(E, 1, 1)` or `(E, hidden, 1)`.
        input_scale: float32, `(1,)` or one a token `(tokens, 1)`, or a `DynamicScale`; None leaves `x` and the
            intermediates in high precision (weight-only).
        intermediate_scale: float32 `(E, 1, 1)`, of what goes into `down`; None scales each token by its own range, as
            (max|·| + 1e-8) / full_scale.
        activation: "silu", "gelu" (with erf) or "relu".
        experts_min: the number in `table` that stands for the first expert.
        full_scale: the value activations saturate at.
        arithmetic: one of `ARITHMETICS`.
        record: counts the call for the module that makes it.

    Returns:
        `[tokens, hidden]` in `x`'s dtype.

    Raises:
        FP8OperandError: input, table and weights do not fit one another.
        FP8ScaleError: a scale does not fit what it belongs to.
        FP8ConfigError: an unknown activation or arithmetic, or a full scale that codes do not reach.
    """
    scale: Any = input_scale  # `call` finds it where it is a rule
    operands = (x, table, router_weights, gate_up, down, gate_up_scale, down_scale, scale, intermediate_scale)
    return call("experts", ExpertsCall(*operands, activation, experts_min, full_scale, arithmetic), record)


def _fake(call: ExpertsCall) -> torch.Tensor:
    return call.x.new_empty(call.x.shape)


declare(
    "experts",
    "(Tensor x, Tensor table, Tensor router_weights, Tensor gate_up, Tensor down, Tensor gate_up_scale, "
    "Tensor down_scale, Tensor? input_scale, Tensor? intermediate_scale, str activation, int experts_min, "
    "float full_scale, str arithmetic) -> Tensor",
    ExpertsCall,
    _fake,
    reference_experts.experts,
    attributed_by=("gate_up",),
    gradient=("x", "router_weights"),
)
