"""CPU kernels: the operators in C, for the processor at hand.

Each variant of the native library (AVX-512 with byte permutation, AVX2, portable C, …) is a backend of its own, called
`cpu_avx2` for example; the best one serves CPU tensors, the others run where they are forced with `ops.backend`.
"""

from __future__ import annotations

import torch

from .. import dispatch
from .attention import Attention
from .kernels import CpuKernels
from .library import VARIANTS, Library, load, threads
from .linear import Linear

OPERATORS = (
    "cast_to_fp8",
    "cast_to_fp8_by_range",
    "cast_to_fp8_with_maxabs",
    "cast_from_fp8",
    "maxabs",
    "dynamic_scale",
    "conv2d",
)

__all__ = ["OPERATORS", "backends", "read_memory", "register"]


def register() -> None:
    """Register a backend for each variant this processor runs; without the native library, note why there is none."""
    library = load()
    if not isinstance(library, Library):
        for name in ("cpu", *(f"cpu_{variant}" for variant in VARIANTS)):
            dispatch.note_missing(name, library)
        return
    for variant in library.too_new:
        dispatch.note_missing(f"cpu_{variant}", f"this processor has not all of the instructions of {variant}")
    for variant in sorted(library.variants, key=lambda variant: variant == library.best):  # the last is asked first
        kernels = CpuKernels(library, variant)
        devices = ("cpu",) if variant == library.best else ()
        for operator in OPERATORS:
            refuses = getattr(kernels, f"refuses_{operator.removesuffix('_with_maxabs')}")
            kernel = dispatch.Kernel(f"cpu_{variant}", devices, getattr(kernels, operator), refuses)
            dispatch.register_kernel(operator, kernel)
        linear, attention = Linear(kernels), Attention(kernels)
        for operator in ("linear", "linears"):
            run, refuses, prepare = (getattr(linear, f"{what}{operator}") for what in ("", "refuses_", "prepare_"))
            dispatch.register_kernel(operator, dispatch.Kernel(f"cpu_{variant}", devices, run, refuses, prepare))
        dispatch.register_kernel("attention", dispatch.Kernel(f"cpu_{variant}", devices, attention, attention.refuses))


def backends() -> list[str]:
    """Names of the CPU backends on this machine, the one in use first; empty without the native library."""
    library = load()
    if not isinstance(library, Library):
        return []
    others = [variant for variant in library.variants if variant != library.best]
    return [f"cpu_{variant}" for variant in (library.best, *others)]


def read_memory(tensor: torch.Tensor) -> None:
    """Read every byte of a contiguous CPU tensor once, with all threads: the fastest that anything can run over it.

    Raises:
        RuntimeError: there is no native library.
    """
    library = load()
    if not isinstance(library, Library):
        raise RuntimeError(library)
    library.read(tensor.data_ptr(), tensor.numel() * tensor.element_size(), threads())
