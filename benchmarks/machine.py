"""The machine: what it is, and what it can do at most."""

from __future__ import annotations

import platform
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

from . import timing

THREADS = 2
MIB = 2**20

_FLAGS = (
    "avx2",
    "avx512f",
    "avx512vbmi",
    "avx512_bf16",
    "avx512_fp16",
    "avx512_vnni",
    "amx_tile",
    "amx_bf16",
    "amx_int8",
)
_SYSFS = Path("/sys/devices/system/cpu")


def prepare() -> None:
    """What holds for every measurement: `THREADS` threads, no progress bars."""
    from transformers.utils import logging

    torch.set_num_threads(THREADS)
    logging.disable_progress_bar()


def cache_bytes(level: int, root: Path = _SYSFS) -> int:
    """The size of the first core's data (or unified) cache of a level, 0 where the machine does not tell."""
    for index in sorted((root / "cpu0" / "cache").glob("index*")):
        kind = (index / "type").read_text().strip()
        if kind != "Instruction" and int((index / "level").read_text()) == level:
            return _bytes((index / "size").read_text())
    return 0


def _bytes(size: str) -> int:
    """ "32K" in bytes."""
    number, unit = re.fullmatch(r"(\d+)([KMG]?)", size.strip()).groups()  # type: ignore[union-attr]
    return int(number) * 1024 ** " KMG".index(unit or " ")


def describe(cpuinfo: str | None = None) -> dict[str, str]:
    """What a reader needs to know to compare figures with those of another machine."""
    cpuinfo = Path("/proc/cpuinfo").read_text() if cpuinfo is None else cpuinfo
    fields = dict(re.findall(r"^([^\t:]+)\t*: (.*)$", cpuinfo.split("\n\n")[0], re.MULTILINE))
    flags = set(fields.get("flags", "").split())
    caches = [
        f"L{level} {size / MIB:g} MiB" if size >= MIB else f"L{level} {size // 1024} KiB"
        for level in (1, 2, 3)
        if (size := cache_bytes(level))
    ]
    memory = re.search(r"MemTotal: +(\d+) kB", Path("/proc/meminfo").read_text())
    return {
        "processor": f"{fields.get('model name', platform.processor())} (family {fields.get('cpu family', '?')}, "
        f"model {fields.get('model', '?')})",
        "instructions": ", ".join(flag for flag in _FLAGS if flag in flags) or "none of " + ", ".join(_FLAGS),
        "cores": f"{cpuinfo.count('processor	:')}, {torch.get_num_threads()} threads used",
        "caches": ", ".join(caches) or "unknown",
        "memory": f"{int(memory[1]) / 2**20:.1f} GiB" if memory else "unknown",
        "system": f"{platform.system()} {platform.release()}, Python {platform.python_version()}",
        "torch": f"{torch.__version__}, {torch.backends.cpu.get_cpu_capability()}",
    }


def reader() -> tuple[Callable[[torch.Tensor], object], str]:
    """What reads every byte of a tensor with all threads as fast as the machine can, and its name."""
    from optimum_fp8 import ops

    if ops.cpu.backends():
        return ops.cpu.read_memory, "a native loop"
    return lambda tensor: tensor.view(torch.int64).sum(), "torch's sum of int64, for want of native kernels"


@dataclass(frozen=True)
class GemmPeak:
    """FLOP/s of torch's matrix product at its best, in both dtypes that FP8 can be computed in."""

    bf16: float
    fp32: float

    @property
    def best(self) -> float:
        """What FP8 is held against: it is free to compute in either, and processors differ in which is faster."""
        return max(self.bf16, self.fp32)

    def __str__(self) -> str:
        return f"matrix product's peak: bf16 {self.bf16 / 1e9:.0f} GFLOP/s, fp32 {self.fp32 / 1e9:.0f} GFLOP/s"


def gemm_peak(
    budget: float = 1.5, size: int = 4096, measure: Callable[[Callable[[], object]], float] = timing.seconds
) -> GemmPeak:
    """The best of several products of square matrices in each dtype, in turns.

    Args:
        budget: seconds after which no new round begins, and that one product may take: matrices are smaller where torch
            is slow (bfloat16 without AVX-512), in that dtype alone.
        size: of the matrices, at most.
        measure: the clock.
    """
    products = {"bf16": _product(torch.bfloat16, size, budget), "fp32": _product(torch.float32, size, budget)}
    times = timing.interleave(products, budget=budget, least=3, most=10, measure=measure)
    return GemmPeak(**{name: 2 * len(product.args[0]) ** 3 / min(times[name]) for name, product in products.items()})


def _product(dtype: torch.dtype, size: int, limit: float) -> partial[torch.Tensor]:
    """A product of square matrices, doubled up to `size` while that is expected to take `limit` seconds at most."""
    width = min(size, 256)
    while True:
        product = partial(F.linear, *(torch.randn(width, width).to(dtype) for _ in range(2)))
        product()
        if 2 * width > size or 8 * timing.seconds(product) > limit:
            return product
        width *= 2


def cold_copies(nbytes: int, limit: int = 1200 * MIB) -> int:
    """How many copies of so many bytes are more than twice the last cache, within `limit` bytes."""
    cache = max(cache_bytes(3), cache_bytes(2), 32 * MIB)
    wanted = 2 * cache // nbytes + 1
    return max(2, min(wanted, limit // nbytes))
