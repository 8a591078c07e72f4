"""Dynamic scales as what they are found by: a rule that stands in the place of the scale of a product's input.

A kernel that knows the rule finds the scale while it computes; for all others `declare.scaled_input` finds it before.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class DynamicScale(NamedTuple):
    """The scale of `x` from its own range: the arguments of `dynamic_scale`."""

    group: int
    divisor: float
    rounding: str
    fp8_config: str
    target: str
    hp_dtype: torch.dtype


def inf_as_nan(x: torch.Tensor) -> torch.Tensor:
    """What is cast with a dynamic scale: `x` with NaN in the place of Inf, which is no part of the scale's range.

    A cast keeps NaN; it would saturate Inf, and make of it a value like any other.
    """
    return x.nan_to_num(nan=torch.nan, posinf=torch.nan, neginf=torch.nan)
