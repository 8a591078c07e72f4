"""The product with an FP8 weight: schema, fake kernel, gradient and the function to call."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch

from . import reference
from .arguments import LinearCall
from .declare import call, declare
from .dynamic import DynamicScale
from .dynamic_linear import dynamic_linear, stands_for
from .gradients import Gradient, without
from .records import CallRecord

_is_compiling = torch.compiler.is_compiling


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    input_scale: torch.Tensor | DynamicScale | None,
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
            precision (weight-only), a `DynamicScale` scales it by its own range.
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
    scale: Any = input_scale  # `call` finds it where it is a rule
    arguments = LinearCall(x, weight, weight_scale, scale, bias, full_scale, arithmetic)
    if _is_compiling() and isinstance(scale, DynamicScale) and stands_for(arguments):
        return dynamic_linear(arguments)  # type: ignore[no-any-return]
    return call("linear", arguments, record)


def _fake(call: LinearCall) -> torch.Tensor:
    return call.x.new_empty((*call.x.shape[:-1], call.weight.shape[0]))


def _keep(call: LinearCall, wanted: Collection[str]) -> Any:
    """The input is kept only for where a scale that does not follow from it saturates it."""
    saturates = "x" in wanted and call.input_scale is not None and "input_scale" not in wanted
    kept = without(call, "bias") if saturates else without(call, "bias", "x", "input_scale")
    return kept if "x" in wanted else without(kept, "weight", "weight_scale")


def _gradient(
    call: LinearCall, gradients: tuple[torch.Tensor | None, ...], wanted: Collection[str]
) -> dict[str, torch.Tensor]:
    (grad,), found = gradients, {}
    assert grad is not None  # else all are zero, and none is asked for
    if "x" in wanted:
        operands = (grad, call.weight, call.weight_scale, call.x, call.input_scale, call.full_scale)
        # Through torch's dispatcher, where calls are attributed by the weight: backwards there is no record.
        found["x"] = torch.ops.optimum_fp8.linear_input_gradient(*operands)
    if "bias" in wanted:
        found["bias"] = grad.reshape(-1, grad.shape[-1]).sum(0, dtype=torch.float32)
    return found


declare(
    "linear",
    "(Tensor x, Tensor weight, Tensor weight_scale, Tensor? input_scale, Tensor? bias, float full_scale, "
    "str arithmetic) -> Tensor",
    LinearCall,
    _fake,
    reference.linear,
    attributed_by=("weight",),
    gradient=Gradient(_keep, _gradient),
)
