"""Mixtures of experts on Gaudi: `mixture_of_experts`, in the overload that its weights and scales ask for.

Its names are the kernel's, not those of Mixtral's checkpoints: w1 is the gate, w2 the up and w3 the down projection;
w12 has the gate above the up projection. It takes lists of matrices: those of the stacks, without a copy. As they are
`[out, in]`, as torch's linear layers have them, `permuted_weights` is true. All scales are s.

| weights have | overload |
|---|---|
| one scale for each half of w12 | `fp8`, whose w1 and w2 have scales of their own |
| one scale for w12, or one an output channel | `fp8_fused_weights` |

All scales are numbers where all are known constants (`_scalars`). Without a scale of the intermediate each token of it
is scaled by its own range (`_dynamic`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ..arguments import ExpertsCall
from ..constants import constant_of, constants_of, part_of
from ..operands import GAUDI_EXPERTS
from ..reference_experts import check_experts, halves_of
from .bridge import full_scale, operator
from .casts import quantize, refuses_full_scale

Scales = list[torch.Tensor] | list[float]


@dataclass(frozen=True)
class _Part:
    """Some of the experts of a call, in its order, and the overload that they are given to.

    Attributes:
        arguments: weights and scales by their names in the schema.
        words: of the overload's name.
    """

    arguments: dict[str, Any]
    words: tuple[str, ...]


def refuses(call: ExpertsCall) -> str | None:
    if call.input_scale is None:
        return "experts whose input is not rounded (weight-only)"
    if call.x.dtype not in (torch.bfloat16, torch.float32):
        return f"experts with an input in {call.x.dtype}"
    if call.arithmetic != "gaudi":
        return f"experts with arithmetic={call.arithmetic!r}: it rounds between its products"
    if reason := refuses_full_scale(call.x, call.gate_up.dtype, call.full_scale):
        return reason
    largest = full_scale(call.gate_up.dtype)
    return f"experts that saturate at {call.full_scale:g} between their products" if call.full_scale < largest else None


def experts(call: ExpertsCall) -> torch.Tensor:
    check_experts(call)
    count, total = call.gate_up.shape[0], None
    assert call.input_scale is not None  # refused before
    hidden = {
        "hidden_states": quantize(call.x, call.input_scale, call.gate_up.dtype, call.full_scale),
        "expert_routing_table": call.table.to(torch.int64),
        "router_weights": call.router_weights.to(torch.bfloat16),
    }
    for start in range(0, count, GAUDI_EXPERTS):
        stop = min(count, start + GAUDI_EXPERTS)
        part = _part(call, start, stop)
        found = operator("mixture_of_experts", "_".join(part.words))(
            **hidden,
            **part.arguments,
            permuted_weights=True,
            activation=call.activation,
            experts_min=call.experts_min + start,
            experts_max=call.experts_min + stop - 1,  # inclusive
        )
        total = found if total is None else total + found
    assert total is not None
    return total.to(call.x.dtype)


def _part(call: ExpertsCall, start: int, stop: int) -> _Part:
    fused = call.gate_up_scale.shape[1] != 2
    gate_up, down = call.gate_up[start:stop].unbind(), call.down[start:stop].unbind()
    scales = {"gate_up": part_of(call.gate_up_scale, start, stop), "w3": part_of(call.down_scale, start, stop)}
    if call.intermediate_scale is not None:
        scales["intermediate_hidden_states"] = part_of(call.intermediate_scale, start, stop)
    numbers = _all_numbers(call, scales)
    listed = {name: _listed(scale, numbers) for name, scale in scales.items()}
    weights: dict[str, Any] = {"w3": list(down)}
    if fused:
        weights["w12"], listed["w12"] = list(gate_up), listed["gate_up"]
    else:
        gates, ups = zip(*(each.chunk(2) for each in gate_up), strict=True)
        weights |= {"w1": list(gates), "w2": list(ups)}
        listed["w1"], listed["w2"] = _halves(scales["gate_up"], numbers)
    del listed["gate_up"]
    named = {f"d_scale_{name}": scale for name, scale in listed.items()}
    hidden_scale = constant_of(call.input_scale) if numbers else call.input_scale
    dynamic = call.intermediate_scale is None
    words = ("fp8", *["fused_weights"] * fused, *["scalars"] * numbers, *["dynamic"] * dynamic)
    return _Part({**weights, **named, "d_scale_hidden_states": hidden_scale}, words)


def _all_numbers(call: ExpertsCall, scales: dict[str, torch.Tensor]) -> bool:
    """Whether all scales are known numbers, one for each matrix: an overload takes either those or tensors."""
    each = {"gate_up": 2 if call.gate_up_scale.shape[1] == 2 else 1}
    one_each = all(scale.shape[1] == each.get(name, 1) for name, scale in scales.items())
    return one_each and None not in (constant_of(call.input_scale), *map(constants_of, scales.values()))


def _listed(scales: torch.Tensor, numbers: bool) -> Scales:
    """One scale, or a row of them, for each expert."""
    if numbers:
        return list(constants_of(scales) or ())
    return [scale.reshape(-1) for scale in scales.unbind()]


def _halves(scales: torch.Tensor, numbers: bool) -> tuple[Scales, Scales]:
    """The scales of gate and up projections, from `(E, 2, 1)`."""
    if numbers:
        values = list(constants_of(scales) or ())
        return values[::2], values[1::2]
    pairs = [halves_of(scale) for scale in scales.unbind()]
    return [gate.reshape(-1) for gate, _ in pairs], [up.reshape(-1) for _, up in pairs]
