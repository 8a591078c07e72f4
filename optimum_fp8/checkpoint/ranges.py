"""The ranges that the scales in a checkpoint were derived from, in the record of its files: for other targets.

They are what calibration's observer chose, for each target where that depends on it, and not its statistics: a number
for most tensors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from ..errors import FP8CheckpointError
from ..formats import TARGETS
from ..lifecycle import FP8State, Phase, state_of
from ..measure import AskedRanges, KnownRange, Observer
from ..modules.handler import Target, converted_modules
from ..selection import Decision, names_in_checkpoint
from .names import name_of
from .native import name_in

Known = Mapping[str, Mapping[str, Any]]


def known_ranges(model: nn.Module) -> dict[str, dict[str, Any]]:
    """The ranges that scales of a model, and of converted models inside it, follow from: by module and tensor, as JSON.

    Where they are not known, a module is left out.
    """
    found: dict[str, dict[str, Any]] = {}
    for prefix, part in model.named_modules():
        state = state_of(part)
        if state is None or state.phase is not Phase.CONVERTED:
            continue
        for target in converted_targets(part, state):
            if asked := _asked(target):
                found[name_of(".".join(filter(None, (prefix, target.name))))] = asked
    return found


def _asked(target: Target) -> dict[str, Any]:
    """What the scales of one module follow from, on any target."""
    if not target.scheme.needs_ranges or target.handler.missing(target) is not None:
        return {}
    ranges = AskedRanges(target.ranges.measurements, target.name, target.ranges.kinds)
    for hardware in TARGETS:
        target.handler.scales_for(replace(target.on(hardware), ranges=ranges))
    return {kind: known.plain() for kind, known in sorted(ranges.known.items())}


def converted_targets(model: nn.Module, state: FP8State) -> list[Target]:
    """The converted modules of a model, also those that another implementation computes at present."""
    converted = {name_of(name): found for name, found in converted_modules(model).items()}
    there = [each for each in state.decisions if each.name in converted]
    ranges = state.measurements.by_module(each.name for each in there)
    return [Target(each.name, *converted[each.name], each.scheme, ranges[each.name], model) for each in there]


def ranges_within(known: Known, prefix: str) -> dict[str, dict[str, Any]]:
    """The ranges of a part of a model, whose name and a dot is `prefix`."""
    return {name.removeprefix(prefix): dict(kinds) for name, kinds in known.items() if name.startswith(prefix)}


def recorded_ranges(
    record: Mapping[str, Any], decisions: Sequence[Decision], prefix: str
) -> dict[tuple[str, str], Observer]:
    """What `known_ranges` put into a record, as observers of the modules that they are for.

    Args:
        record: of a checkpoint.
        decisions: about the modules of a model that it is loaded into.
        prefix: the name of the base model in it, and a dot.

    Raises:
        FP8CheckpointError: they cannot be read.
    """
    known: Known = record.get("ranges", {})
    found: dict[tuple[str, str], Observer] = {}
    for each in decisions:
        name = name_in(names_in_checkpoint(each.name, prefix), known)
        try:
            for kind, said in known[name].items() if name is not None else ():
                found[each.name, kind] = KnownRange.from_plain(said, TARGETS)
        except (ValueError, TypeError, AttributeError) as error:
            raise FP8CheckpointError(
                f"the ranges of {name} in the record of the checkpoint cannot be read ({error}): the checkpoint was "
                "edited or mixed from others: save it again"
            ) from None
    return found
