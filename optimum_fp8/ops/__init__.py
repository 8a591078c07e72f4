"""FP8 arithmetic as a small set of operators in the namespace `torch.ops.optimum_fp8`."""

from .declare import cast_from_fp8, cast_to_fp8, conv2d, dynamic_scale, linear
from .declare_attention import attention, attention_weights, matmul
from .dispatch import CallRecord, Kernel, backend, backends, calls, new_owner, note_fallback, register_kernel
from .reference import ARITHMETICS
from .reference_attention import DATAFLOWS

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
    "conv2d",
    "dynamic_scale",
    "linear",
    "matmul",
    "new_owner",
    "note_fallback",
    "register_kernel",
]
