"""Scales that are known when a model starts: their values, for kernels that take numbers, and their inverses.

A graph compiler applies a scale at no cost only if it is a constant: a number in the call, or a tensor that was marked
as one before. Reading a tensor's value waits for the device, and 1/s would be another tensor in each call: so both are
made once, before the first forward pass, and kept on the scale.
"""

from __future__ import annotations

import torch

from ..formats import HardwareScales
from .remembered import forget, recall, recall_of_copy, remember

_CONSTANT, _INVERSE = "optimum_fp8_constant", "optimum_fp8_inverse"
_is_compiling = torch.compiler.is_compiling


def mark_constant(scale: torch.Tensor, hardware: HardwareScales) -> bool:
    """Read the value of a scale of one element and keep it on the tensor, if hardware applies it at no cost.

    Args:
        scale: float32, a parameter or buffer that no longer changes.
        hardware: the scales that the target applies at no cost.

    Returns:
        whether `constant_of` will give it.
    """
    forget(scale, _CONSTANT)
    return scale.numel() == 1 and mark_constants(scale, hardware)


def mark_constants(scales: torch.Tensor, hardware: HardwareScales) -> bool:
    """As `mark_constant`, of a tensor of several scales, each of which is one of its own: of experts, say."""
    forget(scales, _CONSTANT)
    if scales.is_meta or not scales.numel():
        return False
    values = tuple(scales.flatten().tolist())
    if not set(values).issubset(hardware.descending()):
        return False
    remember(scales, _CONSTANT, values)
    return True


def constant_of(scale: torch.Tensor | None) -> float | None:
    """The value of a scale that `mark_constant` kept; None: not known, or the tensor was written to since."""
    values = None if scale is None else constants_of(scale)
    return values[0] if values is not None and len(values) == 1 else None


def constants_of(scales: torch.Tensor) -> tuple[float, ...] | None:
    """The values that `mark_constants` kept, in the order they are in; None as of `constant_of`."""
    values: tuple[float, ...] | None = recall(scales, _CONSTANT)
    if values is None and not _is_compiling() and (copied := recall_of_copy(scales, _CONSTANT)) is not None:
        forget(scales, _CONSTANT)
        if tuple(scales.flatten().tolist()) == copied:  # read once, since a copy takes along what may be out of date
            remember(scales, _CONSTANT, copied)
            return tuple(copied)
    return values


def keep_inverse(scale: torch.Tensor) -> None:
    """Have `inverse_of` give the same tensor in each call, of a scale of one element that no longer changes."""
    forget(scale, _INVERSE)
    if scale.numel() == 1 and not scale.is_meta:
        remember(scale, _INVERSE, scale.detach().reciprocal())


def inverse_of(scale: torch.Tensor) -> torch.Tensor:
    """1/s: the tensor that is kept, or a new one."""
    kept = kept_inverse(scale)
    return scale.reciprocal() if kept is None else kept


def kept_inverse(scale: torch.Tensor) -> torch.Tensor | None:
    """What `keep_inverse` kept; None: nothing, or the tensor was written to since."""
    inverse: torch.Tensor | None = recall(scale, _INVERSE)
    return inverse


def part_of(scales: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    """`scales[start:stop]`, of which is known what is known of the whole."""
    part, values = scales[start:stop], constants_of(scales)
    if values is not None and not _is_compiling():
        each = len(values) // scales.shape[0]
        remember(part, _CONSTANT, values[start * each : stop * each])
    return part


def scale_of_rows(scale: torch.Tensor, rows: slice, count: int) -> torch.Tensor:
    """The scale of some rows of a weight with `count` of them, given its scale; no scale reaches beyond these rows."""
    if scale.ndim == 1:
        return scale
    each = count // len(scale)  # of a channel or a block
    return part_of(scale, rows.start // each, rows.stop // each)
