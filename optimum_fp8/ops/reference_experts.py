"""The reference of `experts`: plain torch that defines the result, down to each rounding, on any device.

For each token and each of the experts that it is sent to: `down(act(gate(x)) * up(x))`, times the router's weight,
summed over the experts in ascending order. Products are formed from FP8 values (or unrounded ones) held in float32 and
accumulated there; scales are multiplied in afterwards, as one factor. What lies between the products is the
`arithmetic`:

* "fused": everything stays in float32, and the sum is rounded once to the input's dtype.
* "gaudi": each product, the activation, the product of gate and up, the weighting and each sum are rounded to bfloat16,
  which is also what comes out, whatever the input's dtype. Experts are summed up 64 at a time, and these sums then.
* "qdq": operands are dequantized to the input's dtype, then ordinary operators of that dtype run.

The intermediate, which is the input of the last product, is rounded to FP8 with its own scale.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ..errors import FP8ConfigError, FP8OperandError, FP8ScaleError, nearest
from ..formats import is_fp8
from .arguments import ExpertsCall
from .operands import GAUDI_EXPERTS
from .reference import ARITHMETICS, cast_from_fp8, cast_to_fp8
from .straight_through import as_constant

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"gelu": F.gelu, "relu": F.relu, "silu": F.silu}
SMALL = 1e-8  # added to the ranges of intermediates that are scaled dynamically, as Gaudi's operator does


@dataclass(frozen=True)
class _Rounding:
    """The dtype of what lies between the products of a call, and how many experts are summed up at a time."""

    dtype: torch.dtype
    at_a_time: int


def experts(call: ExpertsCall) -> torch.Tensor:
    check_experts(call)
    count = call.gate_up.shape[0]
    between = {
        "fused": _Rounding(torch.float32, count),
        "gaudi": _Rounding(torch.bfloat16, GAUDI_EXPERTS),
        "qdq": _Rounding(call.x.dtype, count),
    }[call.arithmetic]
    parts = [range(start, min(count, start + between.at_a_time)) for start in range(0, count, between.at_a_time)]
    total = call.x.new_zeros(call.x.shape, dtype=between.dtype)
    for part in parts:
        total = total + _sum_of(call, part, between.dtype)
    return total.to(call.x.dtype)


def _sum_of(call: ExpertsCall, part: range, dtype: torch.dtype) -> torch.Tensor:
    """What some of the experts contribute, `[tokens, hidden]` in `dtype`."""
    total = call.x.new_zeros(call.x.shape, dtype=dtype)
    weights = call.router_weights.to(dtype)
    codes, scale = _rounded(call, call.x, call.input_scale)
    for expert in part:
        chosen = call.table == expert + call.experts_min
        rows = chosen.any(dim=1).nonzero().squeeze(1)
        if rows.numel() == 0:
            continue
        own = scale[rows] if scale is not None and scale.numel() > 1 else scale
        middle, middle_scale = _intermediate(call, codes[rows], own, expert, dtype)
        output = _product(call, middle, middle_scale, call.down[expert], call.down_scale[expert], dtype)
        weight = (weights * chosen).sum(dim=1, keepdim=True)[rows]
        total[rows] = total[rows] + output * weight
    return total


def _intermediate(
    call: ExpertsCall, codes: torch.Tensor, scale: torch.Tensor | None, expert: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The input of an expert's last product as codes or values, and its scale."""
    halves = zip(call.gate_up[expert].chunk(2), halves_of(call.gate_up_scale[expert]), strict=True)
    gate, up = (_product(call, codes, scale, *half, dtype) for half in halves)
    values = ACTIVATIONS[call.activation](gate) * up
    if call.input_scale is None:
        return _rounded(call, values, None)
    if call.intermediate_scale is not None:
        return _rounded(call, values, call.intermediate_scale[expert].reshape(1))
    scale = (values.float().abs().amax(dim=1, keepdim=True) + SMALL) / call.full_scale
    return _rounded(call, values, as_constant(scale))


def halves_of(scale: torch.Tensor) -> list[torch.Tensor]:
    """The scales of gate and up from those of an expert's fused weight, `(1, 1)`, `(2, 1)` or `(2 · inner, 1)`."""
    return [scale, scale] if scale.shape[0] == 1 else list(scale.chunk(2))


def _rounded(
    call: ExpertsCall, x: torch.Tensor, scale: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """An operand of a product as codes with their scale; as values that have none in "qdq", or where it is None."""
    if scale is None:
        return x, None
    codes = cast_to_fp8(x, scale, call.gate_up.dtype, call.full_scale)
    return (cast_from_fp8(codes, scale, call.x.dtype), None) if call.arithmetic == "qdq" else (codes, scale)


def _product(
    call: ExpertsCall,
    x: torch.Tensor,
    x_scale: torch.Tensor | None,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor:
    """x Wᵀ, rounded to `dtype`."""
    if call.arithmetic == "qdq":
        return F.linear(x.to(dtype), cast_from_fp8(weight, weight_scale, dtype))
    scale = weight_scale.reshape(1, -1)
    return (F.linear(x.float(), weight.float()) * (scale if x_scale is None else x_scale * scale)).to(dtype)


def check_experts(call: ExpertsCall) -> None:
    """Refuse operands that do not belong together.

    Raises:
        FP8OperandError: names what was found and expected.
        FP8ScaleError: a scale does not fit what it belongs to.
        FP8ConfigError: an unknown activation or arithmetic.
    """
    if call.arithmetic not in ARITHMETICS:
        raise FP8ConfigError(f"arithmetic={call.arithmetic!r} is unknown: {nearest(call.arithmetic, ARITHMETICS)}")
    if call.activation not in ACTIVATIONS:
        raise FP8ConfigError(f"activation={call.activation!r} is unknown: {nearest(call.activation, ACTIVATIONS)}")
    _check_weights(call)
    _check_routes(call)
    _check_scales(call)


def _check_weights(call: ExpertsCall) -> None:
    x, gate_up, down = call.x, call.gate_up, call.down
    if not is_fp8(gate_up.dtype) or down.dtype != gate_up.dtype or is_fp8(x.dtype) or not x.is_floating_point():
        raise FP8OperandError(
            f"experts: an input in {x.dtype}, and weights in {gate_up.dtype} and {down.dtype}: expected an input in "
            "high precision, and weights in one FP8 format"
        )
    fits = x.ndim == 2 and gate_up.ndim == 3 and gate_up.shape[1] % 2 == 0 and gate_up.shape[2] == x.shape[1]
    if not fits or down.shape != (gate_up.shape[0], x.shape[1], gate_up.shape[1] // 2):
        raise FP8OperandError(
            f"experts: an input of shape {tuple(x.shape)}, gate and up of {tuple(gate_up.shape)} and down of "
            f"{tuple(down.shape)}: expected [tokens, hidden], [experts, 2 · inner, hidden] and [experts, hidden, inner]"
        )


def _check_routes(call: ExpertsCall) -> None:
    table, weights = call.table, call.router_weights
    whole = not (table.is_floating_point() or table.is_complex() or table.dtype == torch.bool)
    if not whole or not weights.is_floating_point():
        raise FP8OperandError(
            f"experts: a routing table in {table.dtype} and weights in {weights.dtype}: expected integers and floats"
        )
    if table.ndim != 2 or table.shape[0] != call.x.shape[0] or weights.shape != table.shape:
        raise FP8OperandError(
            f"experts: a routing table of shape {tuple(table.shape)} and weights of {tuple(weights.shape)} for "
            f"{call.x.shape[0]} tokens: expected [tokens, experts of each token] twice"
        )


def _check_scales(call: ExpertsCall) -> None:
    count, columns, tokens = *call.gate_up.shape[:2], call.x.shape[0]
    allowed: dict[str, list[tuple[int, ...]]] = {
        "gate_up_scale": [(count, 1, 1), (count, 2, 1), (count, columns, 1)],
        "down_scale": [(count, 1, 1), (count, call.down.shape[1], 1)],
        "input_scale": [(1,), (tokens, 1)],
        "intermediate_scale": [(count, 1, 1)],
    }
    for name, shapes in allowed.items():
        scale = getattr(call, name)
        if scale is not None and tuple(scale.shape) not in shapes:
            raise FP8ScaleError(
                f"experts: {name} of shape {tuple(scale.shape)}: expected {' or '.join(map(str, shapes))}"
            )
    if call.intermediate_scale is not None and call.input_scale is None:
        raise FP8ScaleError("experts: an intermediate_scale without an input_scale: expected both, the latter, or none")
