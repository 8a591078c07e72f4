"""From a model in high precision to one that is measured, and to its measurements."""

from __future__ import annotations

import logging
import os
from dataclasses import replace
from functools import partial

from torch import nn

from ..config import KEYS, FP8Config
from ..errors import FP8MeasurementError, FP8NotAvailableError, FP8StateError
from ..measure import (
    Context,
    Measurements,
    Observers,
    Processes,
    architecture,
    check_dump_path,
    files_of_inc,
    has_inc_ranges,
    kept_prefix,
    measurements_path,
    model_fingerprint,
    not_found,
    observed_by,
    processes,
)
from ..modules import part_of
from ..modules.handler import find_all
from ..selection import select
from .batch_norm import fold_batch_norms, unfolded_on_error
from .sharded import common_fingerprint, refuse_partial_activations
from .state import MEASURED_BEFORE, FP8State, Phase, measuring_state, refuse_second_time, set_state, unwrapped
from .training import start_training
from .unsigned import is_unsigned, signed

logger = logging.getLogger(__name__)

_WEIGHT = "weight"
_TENSORS = "tensors"  # folder of the tensors that are saved, beside the measurements


def prepare(model: nn.Module, config: FP8Config) -> nn.Module:
    """Put `model` into measuring state: run calibration data through it next, then `convert(model)`.

    With `fake_quant=True` it is put into quantization-aware training: train it next, then `convert(model)`.

    Args:
        model: any module with layers that can be quantized; only hooks are added, and only on selected modules. For
            training, their forwards are replaced, and those that remember ranges get a part `fake_quant` with buffers.
        config: what to quantize and how.

    Returns:
        `model` itself.

    Raises:
        FP8StateError: the model is prepared or converted already.
        FP8SelectionError: a pattern of the config matches nothing, or nothing is selected.
        FP8ConfigError: mode is MEASURE, and nothing can be written to `dump_stats_path`.
        FP8NotAvailableError: the model is in tensor parallelism, or is to be calibrated block by block.
        FP8CalibrationError: there should be other processes, and they cannot be reached.
    """
    given, model = model, unwrapped(model)
    start_measuring(model, config)
    return given


def start_measuring(model: nn.Module, config: FP8Config, *, trained: bool = False) -> FP8State:
    """`prepare`, of a model without wrappers around it.

    Args:
        model: the model.
        config: what to quantize and how.
        trained: whether its weights may change while it is measured; the ranges are taken for those of the weights
            that it has in the end.

    Returns:
        its state.
    """
    refuse_second_time(model, "prepare", config)
    config.post_init()  # keys may have been assigned since it was made
    if config.calibration == "sequential":
        raise FP8NotAvailableError(
            "prepare: calibration='sequential' is for models that are quantized while they are loaded: pass the config "
            "to from_pretrained, with a dataset, or use calibration='whole'"
        )
    if config.mode == "MEASURE":
        check_dump_path(config.dump_stats_path)
    if config.fake_quant:
        return start_training(model, config, new_measurements(model, config))
    with unfolded_on_error(fold_batch_norms(model, config)) as folds:
        decisions = select(model, config)
        measurements = new_measurements(model, config)
        state = FP8State(config, decisions, Phase.MEASURING, measurements, changes=folds)
        start_observing(model, state, trained=trained)
    set_state(model, state)
    return state


def start_observing(model: nn.Module, state: FP8State, *, trained: bool = False) -> None:
    """Attach the observers that the schemes need (none where activations need no ranges).

    Args:
        model: the model.
        state: what was decided about it.
        trained: whether its weights may change from now on.
    """
    targets = state.targets(model)
    if needs_ranges(state):
        refuse_partial_activations(model)
        processes()
    state.observers = Observers(
        state.measurements,
        state.config.measured,
        None if trained else partial(model_fingerprint, model),
        all_experts=state.config.calibrate_all_experts,
    )
    for target in targets:
        target.handler.observe(target, state.observers)
    state.observers.watch_masks(model)
    state.observers.count_experts(model)
    state.change_around(model, [target for target in targets if target.scheme.needs_ranges])


def needs_ranges(state: FP8State) -> bool:
    """Whether any selected module is scaled by calibrated ranges."""
    return any(decision.selected and decision.scheme.needs_ranges for decision in state.decisions)


def saw_activations(measurements: Measurements) -> bool:
    """Whether any data went through: something other than a weight was measured."""
    return any(kind != _WEIGHT for _, kind in measurements.tensors)


def finalize_calibration(model: nn.Module) -> Measurements:
    """End measuring: take the observers off and write the measurements to the config's `dump_stats_path`.

    Of several processes all call it: their measurements become one, which each has then, and one of them writes.

    Returns:
        the measurements. `convert(model)` uses them as they are in memory; another process finds the file.

    Raises:
        FP8StateError: the model is not being measured.
        FP8MeasurementError: nothing was measured, or weights have changed since measuring began.
        FP8CalibrationError: another of several processes had an error, or was lost.
        FP8ConfigError: nothing can be written there; the model can go on measuring, or be converted.
    """
    model = unwrapped(model)
    state = measuring_state(model, "finalize_calibration")
    ranks = processes()
    with ranks.together():
        settle_measurements(model, state)
    measurements = merged_measurements(model, state, ranks)
    observes = state.observers is None or state.observers.is_attached
    if needs_ranges(state) and observes and not saw_activations(measurements):
        raise FP8MeasurementError(
            "finalize_calibration: static activations need calibration data and none went through the model: run "
            "your data through it first"
        )
    with ranks.together():
        if ranks.leads:
            check_dump_path(state.config.dump_stats_path)
            path = measurements.save(state.config.dump_stats_path)
            logger.info("measurements of %d tensors are in %s", len(measurements.tensors), path)
    if state.observers is not None:
        state.observers.remove()
    state.observers, state.measurements = None, measurements
    state.discard_partials()
    return measurements


def merged_measurements(model: nn.Module, state: FP8State, ranks: Processes) -> Measurements:
    """What all processes have measured together; what measuring has ended for is that already."""
    if state.observers is None:
        return state.measurements
    return ranks.merged(state.measurements, everywhere=True, parts=part_of(model) is not None)


def settle_measurements(model: nn.Module, state: FP8State) -> None:
    """Make sure that what was measured so far is of the weights that `model` has now, and sign it with them.

    Weights may change before the first data goes through, and not from then on.

    Raises:
        FP8MeasurementError: they have changed.
    """
    measurements, observers = state.measurements, state.observers
    found = model_fingerprint(model)
    now = state.fingerprint(model) if state.digests else common_fingerprint(model, found)
    changed = now != measurements.fingerprint if observers is None else observers.began_with not in (None, found)
    if changed:
        raise FP8MeasurementError(
            "weights of the model have changed since activations were measured (training, merged adapters, a cast?): "
            "the ranges are not those of this model. Measure it as it is now: dequantize(model) ends measuring, then "
            "prepare(model, config) and your data; or load it again"
        )
    if observers is not None and now != measurements.fingerprint:
        measurements.fingerprint = now
        observers.measure_weights()


def new_measurements(model: nn.Module, config: FP8Config) -> Measurements:
    """Measurements of a model in high precision that hold nothing yet."""
    return replace(empty_measurements(config), fingerprint=fingerprint(model), architecture=architecture(model))


def empty_measurements(config: FP8Config) -> Measurements:
    """Measurements of no model yet, by the observer that `config` names."""
    return Measurements("", observer=config.observer, context=_context(config))


def _context(config: FP8Config) -> Context:
    folder = os.path.join(os.path.dirname(config.dump_stats_path), _TENSORS)
    return Context(folder=folder, percentile=config.percentile)


def unmeasured_state(model: nn.Module, config: FP8Config) -> FP8State:
    """The state of a model that was not prepared: measurements come from the file, where there is one."""
    config.post_init()
    with unfolded_on_error(fold_batch_norms(model, config)) as folds:
        decisions, measurements = select(model, config), new_measurements(model, config)
        state = FP8State(config, decisions, Phase.MEASURING, measurements, changes=folds)
        if needs_ranges(state):
            required = config.scheme == "static" or config.mode == "QUANTIZE"
            stored = stored_measurements(config, model, state.measurements, required=required)
            if stored is not None:
                state.measurements, state.sources = stored, [MEASURED_BEFORE]
    return state


def fingerprint(model: nn.Module) -> str:
    """The fingerprint of a model in high precision.

    Raises:
        FP8StateError: weights that can be quantized are offloaded.
    """
    found = find_all(model).items()
    offloaded = [name for name, (module, _) in found if any(p.is_meta for p in module.parameters(recurse=False))]
    if offloaded:
        raise FP8StateError(
            f"the weights of {len(offloaded)} modules ({', '.join(offloaded[:3])}, …) are offloaded or not loaded: "
            "quantize while loading, with from_pretrained(…, quantization_config=…)"
        )
    return common_fingerprint(model, model_fingerprint(model))


def found_measurements(config: FP8Config, *, required: bool) -> Measurements | None:
    """What is at `dump_stats_path`, of whichever model; None if it is not `required` and nothing is there.

    Raises:
        FP8MeasurementError: they are damaged, or required and missing.
    """
    if not are_there(config.dump_stats_path):
        _miss(config, required)
        return None
    return Measurements.load(config.dump_stats_path)


def are_there(prefix: str) -> bool:
    """Whether there are measurements at a `dump_stats_path`, ours or INC's."""
    return Measurements.exist(prefix) or has_inc_ranges(prefix)


def stored_measurements(
    config: FP8Config, module: nn.Module, model: Measurements, *, required: bool
) -> Measurements | None:
    """Measurements of this very model at `dump_stats_path`, or kept beside; None if not `required` and not there.

    Args:
        config: where to look, and which observer is to read them.
        module: the model.
        model: measurements of the model, which tell it from others.
        required: whether the model cannot do without.

    Raises:
        FP8MeasurementError: they are damaged, without the statistics that the observer needs, or required and missing.
    """
    path, unlike = config.dump_stats_path, None
    places = [each for each in (path, kept_prefix(path, model.fingerprint)) if Measurements.exist(each)]
    places = places or [path] * has_inc_ranges(path)
    if not places:
        _miss(config, required)
        return None
    for place in places:
        stored = Measurements.load(place)
        made = signed(stored, module, model, place) if is_unsigned(stored) else stored
        unlike = made if isinstance(made, str) else made.unlike(model)
        if isinstance(made, str) or unlike is not None:
            continue
        if made is stored and (not required or place != path):  # of others a warning was given
            logger.warning("using the measurements of this model found at %r", place)
        try:
            return observed_by(made, config.observer, _context(config))
        except FP8MeasurementError as error:
            raise FP8MeasurementError(f"the measurements at dump_stats_path={place!r} were {error}") from None
    message = (
        f"the measurements at dump_stats_path={path!r} are of another model ({unlike}): measure this "
        "model, or correct dump_stats_path"
    )
    if required:
        raise FP8MeasurementError(message)
    logger.warning("%s; they are not used", message)
    return None


def _miss(config: FP8Config, required: bool) -> None:
    """Raise where measurements are required or those of INC are meant, and warn where INC's only happen to be there."""
    path = config.dump_stats_path
    from_inc = files_of_inc(path)
    chosen = path != KEYS["dump_stats_path"].default and config.scheme == "auto"
    message = not_found(measurements_path(path), path)
    if required or (from_inc and chosen):
        raise FP8MeasurementError(message)
    if from_inc:
        logger.warning("%s; they are not used", message)
