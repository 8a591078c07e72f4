"""Scales whose values are known when a model starts, for kernels that take numbers instead of tensors.

A graph compiler applies a scale at no cost only if it is a constant: a number in the call. Reading a tensor's value
waits for the device, so it is done once, before the first forward pass, and kept on the tensor.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..formats import HardwareScales

_CONSTANT = "optimum_fp8_constant"
_is_compiling = torch.compiler.is_compiling


class _Constant(NamedTuple):
    """A value, and the version of the tensor that had it."""

    value: float
    version: int


def mark_constant(scale: torch.Tensor, hardware: HardwareScales) -> bool:
    """Read the value of a scale of one element and keep it on the tensor, if hardware applies it at no cost.

    Args:
        scale: float32, a parameter or buffer that no longer changes.
        hardware: the scales that the target applies at no cost.

    Returns:
        whether `constant_of` will give it.
    """
    scale.__dict__.pop(_CONSTANT, None)
    if scale.numel() != 1 or scale.is_meta:
        return False
    value = float(scale)
    if value not in hardware.descending():
        return False
    setattr(scale, _CONSTANT, _Constant(value, _version(scale)))
    return True


def constant_of(scale: torch.Tensor | None) -> float | None:
    """The value of a scale that `mark_constant` kept; None: not known, or the tensor was written to since."""
    constant = getattr(scale, _CONSTANT, None)
    if constant is None or scale is None:
        return None
    return constant.value if _is_compiling() or constant.version == _version(scale) else None


def _version(scale: torch.Tensor) -> int:
    return -1 if scale.is_inference() else scale._version
