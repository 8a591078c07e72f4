"""How far a result is from the expected one: elements that differ, or units in the last place of bfloat16."""

from __future__ import annotations

import math
from typing import Any

import torch

from ..errors import FP8OperandError

_MANTISSA = 7  # bits of bfloat16
_SMALL = 1 / 16  # of the largest output: below, sums in another order differ by more than they are worth


def difference(found: Any, expected: Any, *, exact: bool) -> float:
    """The largest difference between the outputs of an operator.

    Args:
        found, expected: a tensor, or a tuple of tensors.
        exact: count elements that differ; else measure in units in the last place of bfloat16, at the expected value,
            or at a sixteenth of the largest where it is smaller.

    Returns:
        a number of elements, or of units; infinity where one is NaN and the other is not.

    Raises:
        FP8OperandError: another shape or dtype than expected.
    """
    pairs = zip(_tensors(found), _tensors(expected), strict=True)
    each = [(_elements if exact else _ulps)(*_same_kind(*pair)) for pair in pairs]
    return sum(each) if exact else max(each)


def _tensors(result: Any) -> tuple[torch.Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def _same_kind(found: torch.Tensor, expected: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    if found.shape != expected.shape or found.dtype != expected.dtype:
        raise FP8OperandError(
            f"a result of shape {tuple(found.shape)} in {found.dtype}: expected {tuple(expected.shape)} in "
            f"{expected.dtype}"
        )
    return found.cpu(), expected


def _elements(found: torch.Tensor, expected: torch.Tensor) -> int:
    """How many differ by a bit; all NaN are the same."""
    if not expected.is_floating_point():
        return int((found != expected).sum())
    found, expected = found.float(), expected.float()  # exact, for FP8 as well
    differ = (found != expected) | (found.signbit() != expected.signbit())
    return int((differ & ~(found.isnan() & expected.isnan())).sum())


def _ulps(found: torch.Tensor, expected: torch.Tensor) -> float:
    found, expected = found.double(), expected.double()
    finite = expected.isfinite()
    if not torch.equal(found.where(~finite, 0).nan_to_num(nan=1.5), expected.where(~finite, 0).nan_to_num(nan=1.5)):
        return math.inf
    found, expected = found[finite], expected[finite]
    if not found.isfinite().all():
        return math.inf
    magnitude = expected.abs()
    magnitude = magnitude.clamp(min=magnitude.max() * _SMALL) if magnitude.numel() else magnitude
    unit = torch.exp2(magnitude.clamp(min=torch.finfo(torch.bfloat16).tiny).log2().floor() - _MANTISSA)
    return ((found - expected).abs() / unit).max().item() if unit.numel() else 0.0
