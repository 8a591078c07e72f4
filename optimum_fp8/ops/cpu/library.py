"""The native library: found beside this file, loaded once, run on the OpenMP threads that torch already has."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch

PATH = Path(__file__).with_name("libfp8cpu.so")
ABI = 12
VARIANTS = ("avx512amx", "avx512bf16", "avx512vbmi", "avx512", "avx2", "portable", "tiles")
_OUT_OF_MEMORY = 1
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # how `fp8cpu.h` numbers them
FORMATS = {torch.float8_e4m3fn: 0, torch.float8_e5m2: 1}


class Library:
    """The functions of the native library.

    Attributes:
        variants: names of the variants this processor can run, by their index.
        too_new: names of those that it cannot.
        best: the one that is fastest on it.
        threaded: whether torch's OpenMP runtime was found; without it, everything runs on one thread.
        encode, decode, histogram, linear_gradient, grouped, experts, attention, softmax: take packed arguments
            (`fp8cpu.h` names them), return a status.
        linear: takes the packed arguments of several products, and how many.
    """

    def __init__(self, path: Path = PATH):
        native = ctypes.CDLL(str(path))
        native.fp8cpu_variant.restype = ctypes.c_char_p
        native.fp8cpu_set_openmp.argtypes = [ctypes.c_void_p]
        native.fp8cpu_read.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64]
        native.fp8cpu_read.restype = ctypes.c_int64
        if native.fp8cpu_abi() != ABI:
            raise OSError(f"{path} has interface {native.fp8cpu_abi()}, expected {ABI}: install optimum_fp8 again")
        self.variants: dict[str, int] = {}
        self.too_new: list[str] = []
        index = 0
        while (name := native.fp8cpu_variant(index)) is not None:
            if native.fp8cpu_runs(index):
                self.variants[name.decode()] = index
            else:
                self.too_new.append(name.decode())
            index += 1
        self.best: str = native.fp8cpu_variant(native.fp8cpu_best()).decode()
        start_threads = torchs_openmp()
        self.threaded = start_threads is not None
        native.fp8cpu_set_openmp(start_threads)
        packed = ("encode", "decode", "histogram", "linear_gradient", "grouped", "experts", "attention", "softmax")
        for name in (*packed, "linear"):
            function = getattr(native, f"fp8cpu_{name}")
            function.argtypes = [ctypes.c_char_p, ctypes.c_int64] if name == "linear" else [ctypes.c_char_p]
            setattr(self, name, function)
        self.read = native.fp8cpu_read

    encode: Callable[[bytes], int]
    decode: Callable[[bytes], int]
    histogram: Callable[[bytes], int]
    linear: Callable[[bytes, int], int]
    linear_gradient: Callable[[bytes], int]
    grouped: Callable[[bytes], int]
    experts: Callable[[bytes], int]
    attention: Callable[[bytes], int]
    softmax: Callable[[bytes], int]


def torchs_openmp() -> int | None:
    """The address of GOMP_parallel in the OpenMP runtime that torch is linked with; None if there is none.

    The symbol is looked up through torch's own library, so that a second runtime, whose threads would fight the first
    one's for the cores, is never taken."""
    for name in ("libtorch_cpu.so", "libtorch_cpu.dylib"):
        path = Path(torch.__file__).with_name("lib") / name
        if path.exists():
            try:
                return ctypes.cast(ctypes.CDLL(str(path)).GOMP_parallel, ctypes.c_void_p).value
            except (OSError, AttributeError):
                return None
    return None


@cache
def load() -> Library | str:
    """The library, or the reason why there is none."""
    if not PATH.exists():
        return "the native CPU kernels were not built: install optimum_fp8 where a C compiler (gcc or clang) is found"
    try:
        return Library()
    except (OSError, AttributeError) as error:
        return f"the native CPU kernels cannot be loaded: {error}"


class _Threads:
    """How many threads a call may use: torch's number, and one in a forked child, where OpenMP's threads are gone."""

    forked = False


def threads() -> int:
    """The number of threads to run on now."""
    return 1 if _Threads.forked else torch.get_num_threads()


def _after_fork() -> None:
    _Threads.forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def check(status: int, what: str) -> None:
    """Turn a status of the library into an error."""
    if status == _OUT_OF_MEMORY:
        raise MemoryError(f"{what}: no memory for the working copy of the input")
    if status:
        raise RuntimeError(f"{what}: the native library answered {status}: install optimum_fp8 again")
