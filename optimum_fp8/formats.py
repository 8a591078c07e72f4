"""Number formats and targets: which values an FP8 tensor can hold on which hardware.

FP8 comes as E4M3 (4 exponent bits, 3 mantissa bits) and E5M2. Two things differ between targets:

* the **full scale**, the largest value ever emitted. Gaudi2 reads E4M3 codes above 0x77 as Inf/NaN, so its full
  scale is 240; everywhere else it is 448. E5M2 ends at 57344 on all targets.
* the **hardware scales**, the powers of two that the matrix engine applies at no cost, as an exponent bias.

Bytes are those of `torch.float8_e4m3fn` / `torch.float8_e5m2` on all targets. (Gaudi2's range happens to be that of
`float8_e4m3fnuz`, whose bytes mean something else: it is never used.)
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from .errors import FP8ConfigError, nearest

TARGETS = ("gaudi2", "gaudi3", "cuda", "cpu")
GAUDI_TARGETS = ("gaudi2", "gaudi3")
FP8_DTYPES = {"E4M3": torch.float8_e4m3fn, "E5M2": torch.float8_e5m2}
_LAST_FINITE = {torch.float8_e4m3fn: 0x7E, torch.float8_e5m2: 0x7B}
HP_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

# 1/s is taken in float32 and must be finite and normal: these are the outermost usable exponents.
MIN_EXPONENT, MAX_EXPONENT = -126, 126


@dataclass(frozen=True)
class HardwareScales:
    """The set {2^e : min_exponent <= e <= max_exponent, e a multiple of step}, e.g. Gaudi2: {2^-8, 2^-4, 1, 16}."""

    min_exponent: int
    max_exponent: int
    step: int

    def descending(self) -> list[float]:
        """All scales of the set, the largest first."""
        return [2.0**e for e in range(self.max_exponent, self.min_exponent - 1, -self.step)]


# The E4M3 sets serve E5M2 as well, as they do in Intel Neural Compressor, whose numbers we keep.
_GAUDI2 = HardwareScales(min_exponent=-8, max_exponent=4, step=4)
_GAUDI3 = HardwareScales(min_exponent=-55, max_exponent=7, step=1)
_ANY_POWER_OF_TWO = HardwareScales(min_exponent=MIN_EXPONENT, max_exponent=MAX_EXPONENT, step=1)
_HARDWARE_SCALES = {"gaudi2": _GAUDI2, "gaudi3": _GAUDI3, "cuda": _ANY_POWER_OF_TWO, "cpu": _ANY_POWER_OF_TWO}


@dataclass(frozen=True)
class NumberFormat:
    """An FP8 format on a target.

    Attributes:
        name: "E4M3" or "E5M2".
        target: one of `TARGETS`.
        dtype: the torch dtype of the bytes.
        full_scale: the largest finite value that is ever emitted (unitless).
        hardware_scales: the scales the target applies for free.
    """

    name: str
    target: str
    dtype: torch.dtype
    full_scale: float
    hardware_scales: HardwareScales

    @property
    def is_gaudi(self) -> bool:
        return self.target in GAUDI_TARGETS

    @property
    def search_scales(self) -> list[float]:
        """Hardware scales worth trying in a search, largest first (an unbounded set is searched as Gaudi3's)."""
        return (_GAUDI3 if self.hardware_scales == _ANY_POWER_OF_TWO else self.hardware_scales).descending()


@cache
def number_format(fp8_config: str = "E4M3", target: str = "cpu") -> NumberFormat:
    """The number format called `fp8_config` ("E4M3" or "E5M2") on `target`.

    Raises:
        FP8ConfigError: an unknown format or target.
    """
    name = str(fp8_config).upper()
    if name not in FP8_DTYPES:
        raise FP8ConfigError(f"fp8_config={fp8_config!r} is not an FP8 format: {nearest(fp8_config, FP8_DTYPES)}")
    if target not in TARGETS:
        raise FP8ConfigError(f"target={target!r} is unknown: {nearest(target, TARGETS)}")
    full_scale = 57344.0 if name == "E5M2" else 240.0 if target == "gaudi2" else 448.0
    return NumberFormat(name, target, FP8_DTYPES[name], full_scale, _HARDWARE_SCALES[target])


def hp_torch_dtype(hp_dtype: str) -> torch.dtype:
    """The torch dtype of a high-precision dtype name ("bf16", "fp16", "fp32")."""
    if hp_dtype not in HP_DTYPES:
        raise FP8ConfigError(f"hp_dtype={hp_dtype!r} is unknown: {nearest(hp_dtype, HP_DTYPES)}")
    return HP_DTYPES[hp_dtype]


def is_fp8(dtype: torch.dtype) -> bool:
    """Whether `dtype` is one of the two FP8 dtypes in use."""
    return dtype in FP8_DTYPES.values()


def holds_codes(dtype: torch.dtype) -> bool:
    """Whether tensors of `dtype` are codes of some quantization, which mean nothing without their scale."""
    return not dtype.is_complex and dtype != torch.bool and (not dtype.is_floating_point or dtype.itemsize < 2)


def not_finite(codes: torch.Tensor) -> bool:
    """Whether FP8 codes hold NaN or Inf, which no cast emits; nothing of their size is allocated. On meta: no."""
    if codes.is_meta or not codes.numel():
        return False
    last = _LAST_FINITE[codes.dtype]
    return int(codes.view(torch.int8).amax()) > last or int(codes.view(torch.uint8).amax()) > last + 0x80


def codes_beyond(codes: torch.Tensor, fmt: NumberFormat) -> str | None:
    """How far finite FP8 codes exceed what a number format has; None: they do not. On meta: no."""
    if codes.is_meta or not codes.numel() or fmt.full_scale >= torch.finfo(fmt.dtype).max:
        return None
    largest = float((codes.view(torch.uint8) & 0x7F).max().view(codes.dtype).float())  # without the sign
    if largest <= fmt.full_scale:
        return None
    return f"holds codes up to {largest:g}, but {fmt.target} reads those above {fmt.full_scale:g} as Inf"


def gaudi_device() -> Any:
    """Gaudi's counterpart of `torch.cuda` where its bridge was imported, else None: nothing is imported to find out."""
    return getattr(torch, "hpu", None) or sys.modules.get("habana_frameworks.torch.hpu")


def detect_target() -> str:
    """What `target="auto"` means on this machine: the accelerator that is there, else the CPU.

    Raises:
        FP8ConfigError: a Gaudi of a generation that is not known.
    """
    hpu = gaudi_device()
    if hpu is None or not hpu.is_available():
        return "cuda" if torch.cuda.is_available() else "cpu"
    name = str(hpu.get_device_name())
    generation = re.search(r"gaudi[ _-]?(\d+)", name, re.IGNORECASE)
    target = f"gaudi{generation[1]}" if generation else name
    if target not in GAUDI_TARGETS:
        raise FP8ConfigError(
            f"target='auto': this machine's device calls itself {name!r}, expected one of {', '.join(GAUDI_TARGETS)}: "
            f"name the target whose numerics it has, as in FP8Config(target={GAUDI_TARGETS[-1]!r})"
        )
    return target
