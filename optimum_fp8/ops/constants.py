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
    """Values, and the version of the tensor that had them."""

    values: tuple[float, ...]
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
    return scale.numel() == 1 and mark_constants(scale, hardware)


def mark_constants(scales: torch.Tensor, hardware: HardwareScales) -> bool:
    """As `mark_constant`, of a tensor of several scales, each of which is one of its own: of experts, say."""
    scales.__dict__.pop(_CONSTANT, None)
    if scales.is_meta or not scales.numel():
        return False
    values = tuple(scales.flatten().tolist())
    if not set(values).issubset(hardware.descending()):
        return False
    setattr(scales, _CONSTANT, _Constant(values, _version(scales)))
    return True


def constant_of(scale: torch.Tensor | None) -> float | None:
    """The value of a scale that `mark_constant` kept; None: not known, or the tensor was written to since."""
    values = None if scale is None else constants_of(scale)
    return values[0] if values is not None and len(values) == 1 else None


def constants_of(scales: torch.Tensor) -> tuple[float, ...] | None:
    """The values that `mark_constants` kept, in the order they are in; None as of `constant_of`."""
    constant = getattr(scales, _CONSTANT, None)
    if constant is None:
        return None
    return constant.values if _is_compiling() or constant.version == _version(scales) else None


def part_of(scales: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    """`scales[start:stop]`, of which is known what is known of the whole."""
    part, values = scales[start:stop], constants_of(scales)
    if values is not None and not _is_compiling():
        each = len(values) // scales.shape[0]
        setattr(part, _CONSTANT, _Constant(values[start * each : stop * each], _version(part)))
    return part


def _version(scale: torch.Tensor) -> int:
    return -1 if scale.is_inference() else scale._version
