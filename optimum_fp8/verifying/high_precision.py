"""What stayed in high precision, against the model that was quantized: is it the same, but for rounding?"""

from __future__ import annotations

import os
from collections.abc import Iterator

import torch

from .finding import Finding, error
from .layers import Layer
from .opened import Opened, open_folder, reading
from .values import scales_in

HIGH_PRECISION = (torch.float32, torch.bfloat16, torch.float16)
_RELATIVE = 0.01  # rounding to bfloat16 is five times less
_SUBNORMAL = 2.0**-25  # half the smallest step of float16


def check_high_precision_against(
    opened: Opened, layers: list[Layer], base: str | os.PathLike[str]
) -> Iterator[Finding]:
    """The tensors in high precision that are not those of the same name and shape in the base.

    Raises:
        FP8CheckpointError: the base is no folder.
    """
    other, in_fp8 = open_folder(base), {layer.weight for layer in layers} | set(scales_in(opened))
    with reading(opened) as read, reading(other) as read_base:
        for name in sorted((opened.tensors.keys() & other.tensors.keys()) - in_fp8):
            found, original = opened.tensors[name], other.tensors[name]
            if found.shape != original.shape or not {found.dtype, original.dtype} <= {*HIGH_PRECISION}:
                continue
            relative = _difference(read(name), read_base(name))
            if relative is not None:
                what = f"a relative error of {relative:.4f} in high precision"
                expected = "the values of the original, but for rounding"
                yield error(name, what, expected, "quantize the original again, or give the one it was made of")


def _difference(values: torch.Tensor, original: torch.Tensor) -> float | None:
    """The relative error of values; None where rounding to another dtype explains it, or there is none."""
    if torch.equal(values, original):
        return None
    halves = torch.float16 in (values.dtype, original.dtype)
    one, other = values.float(), original.float()
    norm = float(other.norm())
    difference = float(torch.where(one == other, 0, one - other).norm())  # infinite ones may be the same
    allowed = _RELATIVE * norm + (_SUBNORMAL * other.numel() ** 0.5 if halves else 0.0)
    return None if difference <= allowed else difference / norm if norm else float("inf")
