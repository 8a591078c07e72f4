"""CPU kernels: the operators in C, for the processor at hand.

Each variant of the native library (AVX-512 with byte permutation, AVX2, portable C, …) is a backend of its own, called
`cpu_avx2` for example; the best one serves CPU tensors, the others run where they are forced with `ops.backend`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..dispatch import Kernel, note_missing, register_kernel
from .attention import Attention
from .casts import Casts
from .conv import Conv
from .embedding import Embedding
from .experts import Experts
from .grouped_linear import GroupedLinear
from .library import VARIANTS, Library, load, threads
from .linear import Linear
from .linear_gradient import LinearInputGradient

__all__ = ["backends", "read_memory", "register"]


def register() -> None:
    """Register a backend for each variant this processor runs; without the native library, note why there is none."""
    library = load()
    if not isinstance(library, Library):
        note_missing("cpu", library, device=True)
        for variant in VARIANTS:
            note_missing(f"cpu_{variant}", library)
        return
    for variant in library.too_new:
        note_missing(f"cpu_{variant}", f"this processor has not all of the instructions of {variant}")
    for variant in sorted(library.variants, key=lambda variant: variant == library.best):  # the last is asked first
        devices = ("cpu",) if variant == library.best else ()
        for operator, kernel in _kernels(variant, devices, Casts(library, variant)).items():
            register_kernel(operator, kernel)


def _kernels(variant: str, devices: tuple[str, ...], casts: Casts) -> dict[str, Kernel]:
    backend = casts.backend
    linear, conv, attention = Linear(casts, variant), Conv(casts, variant), Attention(casts, variant)
    grouped, experts, embedding = GroupedLinear(casts), Experts(casts), Embedding(casts)
    input_gradient = LinearInputGradient(casts.library, casts.variant)
    one_by_one: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
        "cast_to_fp8": (casts.cast_to_fp8, casts.refuses_cast_to_fp8),
        "cast_to_fp8_by_range": (casts.cast_to_fp8_by_range, casts.refuses_cast_to_fp8_by_range),
        "cast_from_fp8": (casts.cast_from_fp8, casts.refuses_cast_from_fp8),
        "maxabs": (casts.maxabs, casts.refuses_maxabs),
        "histogram": (casts.histogram, casts.refuses_histogram),
    }
    kernels = {name: Kernel(backend, devices, _of_call(run), _of_call(no)) for name, (run, no) in one_by_one.items()}
    return kernels | {
        "dynamic_scale": Kernel(backend, devices, casts.dynamic_scale, casts.refuses_dynamic_scale),
        "linear": Kernel(backend, devices, linear.run, linear.refuses, linear.prepare),
        "linear_input_gradient": Kernel(backend, devices, input_gradient.run, input_gradient.refuses),
        "embedding": Kernel(backend, devices, embedding.run, embedding.refuses),
        "conv": Kernel(backend, devices, conv.run, conv.refuses),
        "grouped_linear": Kernel(backend, devices, grouped.run, grouped.refuses),
        "experts": Kernel(backend, devices, experts.run, experts.refuses),
        "attention": Kernel(backend, devices, attention.run, attention.refuses),
    }


def _of_call(function: Callable[..., Any]) -> Callable[[Any], Any]:
    """A function of the operator's arguments as one of the call."""
    return lambda call: function(*call)


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
