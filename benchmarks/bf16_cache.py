"""Our own attention over a cache in bfloat16: the kernel that FP8 has to beat, as it is the same but for the elements.

The library has none. It is compiled here, from the package's sources as setup.py compiles them for this processor, with
`bf16_elements.h` in the place of what these say of codes. That needs a C compiler: `CC`, or that of Python.
"""

from __future__ import annotations

import ctypes
import os
import runpy
import shlex
import subprocess
import sysconfig
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import torch

from optimum_fp8 import ops
from optimum_fp8.ops.cpu import library as native

from .failures import end_of

_ROOT = Path(__file__).parents[1]
_SOURCES = ("attention.c", "softmax.c")  # of all that are compiled for each kind of processor
_BITS = torch.float8_e4m3fn  # what the kernel is told that elements are; nobody looks at them as such
_ONE = torch.ones(1)


@cache
def load() -> Callable[[bytes], int]:
    """The operator, on the variant that runs FP8 here: takes packed arguments, returns a status.

    Raises:
        RuntimeError: it cannot be compiled here: the message tells why.
    """
    if not ops.cpu.backends():
        raise RuntimeError(str(ops.missing("cpu")))
    variant = ops.cpu.backends()[0].removeprefix("cpu_")
    with TemporaryDirectory() as folder:
        library = ctypes.CDLL(str(_compile(variant, Path(folder, "bf16_cache.so"))))
    library.fp8cpu_set_openmp.argtypes = [ctypes.c_void_p]
    library.fp8cpu_set_openmp(native.torchs_openmp())
    function = getattr(library, f"fp8cpu_attention_{variant}")
    function.argtypes = [ctypes.c_char_p]
    return function


def _compile(variant: str, target: Path) -> Path:
    """One library of attention and what it calls.

    Raises:
        RuntimeError: there is no C compiler, or it fails.
    """
    with mock.patch("setuptools.setup"):
        build: dict[str, Any] = runpy.run_path(str(_ROOT / "setup.py"))
    folder = _ROOT / build["NATIVE"]
    own = {source: flags for source, name, flags in build["sources_of_variants"](amx=True) if name == variant}
    command = shlex.split(os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc")
    command += [*build["FLAGS"], *own["attention.c"], f"-DFP8CPU_VARIANT={variant}", "-fvisibility=default", "-shared"]
    command += [f'-DFP8CPU_ELEMENTS="{Path(__file__).with_name("bf16_elements.h")}"', f"-I{folder}"]
    command += [*(str(folder / source) for source in (*_SOURCES, "parallel.c")), "-lm", "-o", str(target)]
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise RuntimeError(f"no C compiler {command[0]!r}") from None
    if done.returncode:
        raise RuntimeError(f"{command[0]} {end_of(done.returncode, done.stderr)}")
    return target


def attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """`[B, S, H, D]`, without a mask, of queries `[B, H, S, D]` over keys and values in bfloat16.

    It is the operator itself, with the other kernel behind it: calling it costs as much as over FP8.
    """
    library = native.load()
    assert isinstance(library, native.Library)  # or there was nothing to compile
    library.attention, own = load(), library.attention
    try:
        return ops.attention(
            *(query, _elements(key), _elements(value), None, _ONE, _ONE, None, None, None),
            scaling=query.shape[-1] ** -0.5,
            dtype=_BITS,
            full_scale=448.0,
        )
    finally:
        library.attention = own


def _elements(x: torch.Tensor) -> torch.Tensor:
    """The same memory, shape and strides, under the name of codes."""
    return x.view(_BITS).as_strided(x.shape, x.stride())
