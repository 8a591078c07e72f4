"""From schemes and ranges to FP8 modules, through the handlers; an error leaves the model as it was."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from ..config import FP8Config
from ..errors import FP8MeasurementError
from ..measure import Processes, processes
from ..modules import swap
from ..modules.folded_batch_norm import Fold
from ..modules.handler import Conversion, Family, Reason, Target, Why, converted_modules, pack_all
from ..modules.quantized_once import QuantizedOnce
from ..selection import leave_out, read_by_owner, reschemed
from .float8_training import refuse_float8_training
from .prepare import merged_measurements, needs_ranges, settle_measurements
from .provenance import made_here
from .sharded import refuse_sharded
from .state import FP8State, Phase, set_state, state_of

logger = logging.getLogger(__name__)

_MULTIPLIED = Why(Reason.UNFIT, "the code around it multiplied by its weight and never called it")


def convert_with(model: nn.Module, state: FP8State, finish: Callable[[Any], None] | None = None) -> Callable[[], None]:
    """Convert with what `state` knows, then call `finish(model)`.

    Returns:
        what takes it all back: the model is as it was, to the very modules. It keeps these alive.

    Raises:
        FP8MeasurementError: static activations without calibration data, modules that calibration never reached, or
            ranges of weights that have changed since.
        FP8NotAvailableError: the weights are spread over processes, or another library trains in FP8.
        FP8CalibrationError: another of several processes had an error, or was lost.
        FP8ScaleError: a weight that has no sound scale.
    """
    refuse_float8_training(model, "convert")
    state = _with_final_schemes(model, _with_all_ranges(model, state))
    targets = state.targets(model)
    missing = _missing(model, targets, state.config.ignore_modules_wo_measures)
    remaining = [target for target in targets if target.name not in missing]
    _check_families(remaining)
    _warn_of_zero_ranges(targets)
    quantize = QuantizedOnce(state.weight_scales)
    conversions = [(target, target.handler.convert(target, model, quantize)) for target in remaining]
    if needs_ranges(state):
        settle_measurements(model, state)
    given_up = _given_up(targets, missing)
    replacements = {target.module: made.replacement for target, made in conversions if made.replacement is not None}
    replacements |= given_up

    converted = replace(
        state,
        phase=Phase.CONVERTED,
        observers=None,
        decisions=leave_out(state.decisions, missing),
        changes=[change for change in state.changes if not isinstance(change, Fold)],
        weight_scales={},
    )
    converted.provenance = made_here(converted)
    take_back = _applied(model, converted, [made for _, made in conversions], replacements, finish)
    pack_all(model)
    if state.observers is not None:
        state.observers.remove()
    converted.discard_partials()
    return take_back


def _applied(
    model: nn.Module,
    converted: FP8State,
    conversions: list[Conversion],
    replacements: Mapping[nn.Module, nn.Module],
    finish: Callable[[Any], None] | None,
) -> Callable[[], None]:
    """Do what was made; an error undoes it, and so does what is returned."""
    previous, before = state_of(model), len(converted.changes)
    done: list[Conversion] = []

    def take_back() -> None:
        swap(model, {new: old for old, new in replacements.items()})
        for change in reversed(converted.changes[before:]):
            change.undo()
        for conversion in reversed(done):
            conversion.undo()
        set_state(model, previous)

    swap(model, replacements)
    set_state(model, converted)
    try:
        for conversion in conversions:
            done.append(conversion)
            conversion.apply()
        converted.change_around(model, converted.targets(model))
        if finish is not None:
            finish(model)
    except BaseException:
        take_back()
        raise
    return take_back


def _with_all_ranges(model: nn.Module, state: FP8State) -> FP8State:
    """The state with what all processes have measured."""
    refuse_sharded(model, "convert")
    ranks = processes() if needs_ranges(state) and state.observers is not None else Processes()
    if ranks.count == 1:
        return state
    with ranks.together():
        settle_measurements(model, state)
    return replace(state, measurements=merged_measurements(model, state, ranks))


def convert_some(model: nn.Module, targets: list[Target]) -> None:
    """Have some modules whose weights became FP8 while loading compute in FP8, while others are still measured.

    Those that are in high precision stay so until the whole model is converted.

    Raises:
        FP8MeasurementError: modules that calibration never reached, or ranges that are not finite.
    """
    quantize, converted = QuantizedOnce(), converted_modules(model)
    there = [each for each in targets if each.name in converted or not each.handler.family.replaced]
    ready = [each for each in there if each.handler.missing(each) is None]
    made = [each.handler.convert(each, model, quantize) for each in ready]
    for conversion in made:
        conversion.apply()


def refuse_unreached(model: nn.Module, targets: list[Target], ignore: bool) -> None:
    """Refuse modules that no data will reach, or warn of them where that is to be ignored.

    Raises:
        FP8MeasurementError: names them, and says what to do.
    """
    _missing(model, targets, ignore)


def _with_final_schemes(model: nn.Module, state: FP8State) -> FP8State:
    """The state with the schemes that hold now that it is known whether there are ranges.

    Raises:
        FP8MeasurementError: static activations and no data went through.
    """
    config: FP8Config = state.config
    if not needs_ranges(state) or any(_is_reached(target) for target in state.targets(model)):
        return state
    observed = state.observers is not None and "input" in config.measured
    if config.scheme == "auto" and not observed:
        logger.warning("no calibration data: activations are scaled dynamically (activation_scheme='dynamic')")
        decisions = reschemed(model, state.decisions, config, calibrated=False)
        config = config.decided("dynamic", [(each.names, each.types) for each in decisions])
        state = replace(state, config=config, decisions=decisions)
        if not needs_ranges(state):
            return state
    raise FP8MeasurementError(
        "static activations need calibration data and none went through the model: run your data through it "
        "after prepare(), give a `dataset`, or use activation_scheme='dynamic'"
    )


def _is_reached(target: Target) -> bool:
    """Whether calibration has seen what the conversion of a module needs; a weight alone tells nothing."""
    seen = target.ranges.kinds - {"weight"}
    return target.scheme.needs_ranges and bool(seen) and target.handler.missing(target) is None


def unreached(model: nn.Module, targets: list[Target]) -> list[Target]:
    """The modules that calibration has not reached, other than those whose weights alone are read in the end."""
    missing = _without_ranges(model, targets)
    return [target for target in targets if target.name in missing and _is_unreached(missing[target.name])]


def _without_ranges(model: nn.Module, targets: list[Target]) -> dict[str, Why]:
    """Why the modules cannot be converted that lack ranges."""
    missing = {target.name: why for target in targets if (why := target.handler.missing(target)) is not None}
    if any(_is_unreached(why) for why in missing.values()):
        read = read_by_owner(model, certain=False)  # such modules need not be called
        missing |= {name: _MULTIPLIED for name, why in missing.items() if _is_unreached(why) and name in read}
    return missing


def _missing(model: nn.Module, targets: list[Target], ignore: bool) -> dict[str, Why]:
    """The modules that cannot be converted with the ranges there are. Raises unless it is told to `ignore` them."""
    missing = _without_ranges(model, targets)
    never = [target for target in targets if target.name in missing and _is_unreached(missing[target.name])]
    for family in _families(never):
        names = [target.name for target in never if target.handler.family == family]
        if not ignore:
            raise FP8MeasurementError(
                f"{len(names)} {family.noun} were never reached by calibration: {', '.join(names[:8])}"
                f"{', …' if len(names) > 8 else ''}: {family.reaching}"
            )
        logger.warning("not reached by calibration, activations stay in high precision: %s", ", ".join(names))
    return missing


def _is_unreached(why: Why) -> bool:
    return why.reason is Reason.NEVER_REACHED


def _families(targets: list[Target]) -> list[Family]:
    return list({target.handler.family.name: target.handler.family for target in targets}.values())


def _check_families(targets: list[Target]) -> None:
    for family in _families(targets):
        family.check(target for target in targets if target.handler.family == family)


def _warn_of_zero_ranges(targets: list[Target]) -> None:
    """Warn of inputs that were zero throughout calibration: that says nothing of what they may hold later."""
    zero = [
        target.name
        for target in targets
        if target.scheme.needs_ranges and "input" in target.ranges.kinds and target.ranges.largest("input") == 0
    ]
    if zero:
        logger.warning("inputs that were zero throughout calibration: %s; calibrate with other data", zero[:8])


def _given_up(targets: list[Target], missing: Mapping[str, Why]) -> dict[nn.Module, nn.Module]:
    """High-precision modules for the places of those that became FP8 while loading and cannot stay so."""
    restored: dict[nn.Module, nn.Module] = {}
    for target in targets:
        handler = target.handler
        if target.name in missing and handler.family.replaced and handler.converted(target.module):
            module = handler.restore(target.module)
            if module is not None:
                restored[target.module] = module
    return restored
