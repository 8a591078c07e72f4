"""FP8 arithmetic as a small set of operators in the namespace `torch.ops.optimum_fp8`.

A backend is a package in this folder with a function `register()` that registers its kernels, or notes why it has none
(`dispatch.register_kernel`, `dispatch.note_missing`).
"""

from importlib import import_module
from pkgutil import iter_modules
from typing import TYPE_CHECKING

from .attention import attention, attention_weights, matmul, softmax
from .casts import cast_from_fp8, cast_to_fp8, cast_to_fp8_by_range, dynamic_scale, histogram, maxabs
from .constants import constant_of, inverse_of, keep_inverse, mark_constant, mark_constants, part_of, scale_of_rows
from .conv import conv
from .declare import scaled_input
from .dispatch import Kernel, backend, backends, missing, register_kernel, why_reference
from .dynamic import DynamicScale, inf_as_nan
from .embedding import embedding
from .experts import experts
from .grouped_linear import grouped_linear
from .linear import linear
from .linear_gradient import linear_input_gradient
from .packing import packing_for, packing_of
from .records import CallRecord, note_fallback
from .reference import ARITHMETICS
from .reference_attention import DATAFLOWS

if TYPE_CHECKING:
    from . import cpu

for _module in iter_modules(__path__):
    if _module.ispkg and hasattr(_package := import_module(f"{__name__}.{_module.name}"), "register"):
        _package.register()

__all__ = [
    "ARITHMETICS",
    "DATAFLOWS",
    "CallRecord",
    "DynamicScale",
    "Kernel",
    "attention",
    "attention_weights",
    "backend",
    "backends",
    "cast_from_fp8",
    "cast_to_fp8",
    "cast_to_fp8_by_range",
    "constant_of",
    "conv",
    "cpu",
    "dynamic_scale",
    "embedding",
    "experts",
    "grouped_linear",
    "histogram",
    "inf_as_nan",
    "inverse_of",
    "keep_inverse",
    "linear",
    "linear_input_gradient",
    "mark_constant",
    "mark_constants",
    "matmul",
    "maxabs",
    "missing",
    "note_fallback",
    "packing_for",
    "packing_of",
    "part_of",
    "register_kernel",
    "scale_of_rows",
    "scaled_input",
    "softmax",
    "why_reference",
]
