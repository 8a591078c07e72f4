"""FP8 arithmetic as a small set of operators in the namespace `torch.ops.optimum_fp8`."""

from .declare import cast_from_fp8, cast_to_fp8, conv2d, dynamic_scale, linear
from .dispatch import CallRecord, Kernel, backend, backends, calls, new_owner, register_kernel
from .reference import ARITHMETICS

__all__ = [
    "ARITHMETICS",
    "CallRecord",
    "Kernel",
    "backend",
    "backends",
    "calls",
    "cast_from_fp8",
    "cast_to_fp8",
    "conv2d",
    "dynamic_scale",
    "linear",
    "new_owner",
    "register_kernel",
]
