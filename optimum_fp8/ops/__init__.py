"""FP8 arithmetic as a small set of operators in the namespace `torch.ops.optimum_fp8`."""

from ..import_hook import when_imported
from . import cpu, inductor
from .declare import (
    cast_from_fp8,
    cast_to_fp8,
    cast_to_fp8_by_range,
    cast_to_fp8_with_maxabs,
    conv2d,
    dynamic_scale,
    linear,
    linears,
    maxabs,
)
from .declare_attention import attention, attention_weights, matmul
from .dispatch import CallRecord, Kernel, backend, backends, calls, missing, new_owner, note_fallback, register_kernel
from .reference import ARITHMETICS
from .reference_attention import DATAFLOWS

cpu.register()
when_imported("torch._inductor.lowering", inductor.register)

__all__ = [
    "ARITHMETICS",
    "DATAFLOWS",
    "CallRecord",
    "Kernel",
    "attention",
    "attention_weights",
    "backend",
    "backends",
    "calls",
    "cast_from_fp8",
    "cast_to_fp8",
    "cast_to_fp8_by_range",
    "cast_to_fp8_with_maxabs",
    "conv2d",
    "cpu",
    "dynamic_scale",
    "linear",
    "linears",
    "matmul",
    "maxabs",
    "missing",
    "new_owner",
    "note_fallback",
    "register_kernel",
]
