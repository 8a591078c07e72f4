"""Mixtures of experts on the native library."""

from __future__ import annotations

from struct import Struct

import torch

from ...errors import FP8Error
from ..arguments import ExpertsCall
from ..operands import GAUDI_EXPERTS, refuses_format
from ..reference_experts import check_experts
from .casts import Casts
from .library import FORMATS, TYPES, check, threads

_ARGUMENTS = Struct("=27qd")  # fp8cpu_experts_args
_ACTIVATIONS = {"silu": 0, "gelu": 1, "relu": 2}  # how `fp8cpu.h` numbers them


class Experts:
    """The operator `experts` on one variant of the library."""

    def __init__(self, casts: Casts):
        self.casts = casts

    def refuses(self, call: ExpertsCall) -> str | None:
        x, gate_up, down, router = call.x, call.gate_up, call.down, call.router_weights
        if call.arithmetic not in ("fused", "gaudi"):
            return f"arithmetic {call.arithmetic!r}"
        if x.dtype not in TYPES or gate_up.dtype not in FORMATS or router.dtype not in TYPES:
            return f"inputs in {x.dtype} with weights in {gate_up.dtype} and those of the router in {router.dtype}"
        for weight in (gate_up, down):
            if not weight.is_contiguous() or 0 in weight.shape:
                return f"weights of {tuple(weight.shape)}, strides {weight.stride()}"
        for scale in (call.gate_up_scale, call.down_scale, call.input_scale, call.intermediate_scale):
            if scale is not None and scale.dtype != torch.float32:
                return f"scales in {scale.dtype}"
        try:
            check_experts(call)
        except FP8Error as error:  # which the reference raises
            return str(error)
        return None if call.input_scale is None else refuses_format(gate_up.dtype, call.full_scale)

    def run(self, call: ExpertsCall) -> torch.Tensor:
        # The copies that are made here must live until the call returns.
        x, table, router = (
            call.x.contiguous(),
            call.table.to(torch.int64).contiguous(),
            call.router_weights.contiguous(),
        )
        gate_up_scale, down_scale = call.gate_up_scale.contiguous(), call.down_scale.contiguous()
        input_scale = None if call.input_scale is None else call.input_scale.contiguous()
        middle_scale = None if call.intermediate_scale is None else call.intermediate_scale.contiguous()
        (tokens, hidden), (count, _, inner), chosen = x.shape, call.down.shape, table.shape[1]
        y, rounds = torch.empty_like(x), call.arithmetic == "gaudi"
        packed = _ARGUMENTS.pack(
            *(self.casts.variant, threads(), tokens, chosen, count, hidden, inner),
            *(x.data_ptr(), TYPES[x.dtype]),
            *((0, 0) if input_scale is None else (input_scale.data_ptr(), input_scale.numel() != 1)),
            *(table.data_ptr(), call.experts_min, router.data_ptr(), TYPES[router.dtype], y.data_ptr()),
            *(call.gate_up.data_ptr(), call.down.data_ptr(), FORMATS[call.gate_up.dtype]),
            *(gate_up_scale.data_ptr(), gate_up_scale.shape[1], down_scale.data_ptr(), down_scale.shape[1]),
            0 if middle_scale is None else middle_scale.data_ptr(),
            *(_ACTIVATIONS[call.activation], rounds, GAUDI_EXPERTS if rounds else 0),
            call.full_scale,
        )
        check(self.casts.library.experts(packed), "experts")
        return y
