"""Scales of what goes into the experts of a mixture, from what calibration has seen of each."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence

import torch

from ..measure.inc.names import INTERMEDIATE
from .handler import Reason, Target, Why

logger = logging.getLogger(__name__)


def why_missing(target: Target, numbers: Iterable[int]) -> Why | None:
    """Why a mixture cannot be converted with the ranges there are, or None.

    Args:
        target: the mixture.
        numbers: those of its experts in the whole model.
    """
    if target.scheme.needs_ranges and ("input" not in target.ranges.kinds or not reached(target, numbers)):
        return Why(Reason.NEVER_REACHED)
    return None


def static_scales(target: Target, numbers: Sequence[int]) -> dict[str, torch.Tensor]:
    """The static scales of what is rounded at run time: `input_scale` `(1,)`, `intermediate_scale` `(E, 1, 1)`.

    An expert that calibration never reached is scaled as the one of its mixture with the largest range.
    """
    scheme = target.scheme
    if not scheme.is_static:
        return {}
    if not scheme.needs_ranges:
        one = scheme.static_scale(torch.zeros(()))
        return {"input_scale": one, "intermediate_scale": one.reshape(1, 1, 1).repeat(len(numbers), 1, 1)}
    seen = reached(target, numbers)
    largest = max(seen, key=lambda number: seen[number])
    scales = [target.static_scale(f"{INTERMEDIATE}{n if n in seen else largest}") for n in numbers]
    return {
        "input_scale": target.static_scale("input"),
        "intermediate_scale": torch.stack(scales).reshape(-1, 1, 1),
    }


def reached(target: Target, numbers: Iterable[int]) -> dict[int, float]:
    """The ranges of the experts that calibration has reached, by their numbers."""
    kinds = {number: f"{INTERMEDIATE}{number}" for number in numbers}
    ranges = {number: float(target.ranges.of(kind)) for number, kind in kinds.items() if kind in target.ranges.kinds}
    return {number: found for number, found in ranges.items() if found > 0}


def warn_of_unreached(target: Target, numbers: Sequence[int]) -> None:
    """Say which experts are scaled by the range of others, and how many of how many they are."""
    seen = reached(target, numbers) if target.scheme.needs_ranges else numbers
    unreached = [number for number in numbers if number not in seen]
    if unreached:
        logger.warning(
            "%s: %d of %d experts were never reached by calibration (%s%s): what goes into their down projections is "
            "scaled by the largest range of the others; calibrate with more, or more varied data",
            *(target.name, len(unreached), len(numbers), ", ".join(map(str, unreached[:8]))),
            ", …" if len(unreached) > 8 else "",
        )
