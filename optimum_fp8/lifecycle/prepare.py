"""From a model in high precision to one that is measured, and to its measurements."""

from __future__ import annotations

import logging
from functools import partial

import torch
from accelerate.utils import get_cpu_distributed_information
from torch import nn

from ..config import KEYS, FP8Config
from ..errors import FP8MeasurementError, FP8NotAvailableError, FP8StateError
from ..measure import (
    Measurements,
    Observers,
    architecture,
    check_dump_path,
    files_of_inc,
    kept_prefix,
    measurements_path,
    model_fingerprint,
    not_found,
)
from ..modules.handler import find_all
from ..selection import select
from .state import FP8State, Phase, measuring_state, refuse_second_time, set_state, unwrapped

logger = logging.getLogger(__name__)

_WEIGHT = "weight"


def prepare(model: nn.Module, config: FP8Config) -> nn.Module:
    """Put `model` into measuring state: run calibration data through it next, then `convert(model)`.

    Args:
        model: any module with layers that can be quantized; only hooks are added, and only on selected modules.
        config: what to quantize and how.

    Returns:
        `model` itself.

    Raises:
        FP8StateError: the model is prepared or converted already.
        FP8SelectionError: a pattern of the config matches nothing, or nothing is selected.
        FP8ConfigError: mode is MEASURE, and nothing can be written to `dump_stats_path`.
        FP8NotAvailableError: ranges are to be measured in several processes.
    """
    given, model = model, unwrapped(model)
    refuse_second_time(model, "prepare", config)
    config.post_init()  # keys may have been assigned since it was made
    if config.mode == "MEASURE":
        check_dump_path(config.dump_stats_path)
    decisions = select(model, config)
    measurements = new_measurements(model, config)
    state = FP8State(config, decisions, Phase.MEASURING, measurements)
    start_observing(model, state)
    set_state(model, state)
    return given


def start_observing(model: nn.Module, state: FP8State) -> None:
    """Attach the observers that the schemes need (none where activations need no ranges)."""
    targets = state.targets(model)
    if needs_ranges(state):
        refuse_several_processes()
    state.observers = Observers(state.measurements, state.config.measured, partial(model_fingerprint, model))
    for target in targets:
        target.handler.observe(target, state.observers)
    state.observers.watch_masks(model)
    state.change_around(model, [target for target in targets if target.scheme.needs_ranges])


def refuse_several_processes() -> None:
    """Refuse to measure where this process is one of several: each would know the ranges of its own data only.

    Raises:
        FP8NotAvailableError: there are others, in a process group or by the launcher's word.
    """
    grouped = torch.distributed.is_available() and torch.distributed.is_initialized()
    count = torch.distributed.get_world_size() if grouped else get_cpu_distributed_information().world_size
    if count > 1:
        raise FP8NotAvailableError(
            f"calibration in {count} processes at once: each would have the ranges of its own data, and write over the "
            "others' measurements. Calibrate in one process (without torchrun, tp_plan and the like) and save the "
            "model, or its measurements for mode='QUANTIZE'"
        )


def needs_ranges(state: FP8State) -> bool:
    """Whether any selected module is scaled by calibrated ranges."""
    return any(decision.selected and decision.scheme.needs_ranges for decision in state.decisions)


def saw_activations(measurements: Measurements) -> bool:
    """Whether any data went through: something other than a weight was measured."""
    return any(kind != _WEIGHT for _, kind in measurements.tensors)


def finalize_calibration(model: nn.Module) -> Measurements:
    """End measuring: take the observers off and write the measurements to the config's `dump_stats_path`.

    Returns:
        the measurements. `convert(model)` uses them as they are in memory; another process finds the file.

    Raises:
        FP8StateError: the model is not being measured.
        FP8MeasurementError: nothing was measured, or weights have changed since measuring began.
        FP8NotAvailableError: this process is one of several, which would write over each other's file.
        FP8ConfigError: nothing can be written there; the model can go on measuring, or be converted.
    """
    model = unwrapped(model)
    state = measuring_state(model, "finalize_calibration")
    observes = state.observers is None or state.observers.is_attached
    if needs_ranges(state) and observes and not saw_activations(state.measurements):
        raise FP8MeasurementError(
            "finalize_calibration: static activations need calibration data and none went through the model: run "
            "your data through it first"
        )
    refuse_several_processes()
    check_dump_path(state.config.dump_stats_path)
    settle_measurements(model, state)
    path = state.measurements.save(state.config.dump_stats_path)
    if state.observers is not None:
        state.observers.remove()
    state.observers = None
    logger.info("measurements of %d tensors are in %s", len(state.measurements.tensors), path)
    return state.measurements


def settle_measurements(model: nn.Module, state: FP8State) -> None:
    """Make sure that what was measured so far is of the weights that `model` has now, and sign it with them.

    Weights may change before the first data goes through, and not from then on.

    Raises:
        FP8MeasurementError: they have changed.
    """
    measurements, observers, now = state.measurements, state.observers, state.fingerprint(model)
    if observers is None:
        changed = now != measurements.fingerprint
    else:
        changed = observers.began_with not in (None, model_fingerprint(model))
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
    return Measurements(fingerprint(model), observer=config.observer, architecture=architecture(model))


def unmeasured_state(model: nn.Module, config: FP8Config) -> FP8State:
    """The state of a model that was not prepared: measurements come from the file, where there is one."""
    config.post_init()
    state = FP8State(config, select(model, config), Phase.MEASURING, new_measurements(model, config))
    if needs_ranges(state):
        required = config.scheme == "static" or config.mode == "QUANTIZE"
        stored = stored_measurements(config, state.measurements, required=required)
        state.measurements = stored or state.measurements
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
    return model_fingerprint(model)


def found_measurements(config: FP8Config, *, required: bool) -> Measurements | None:
    """What is at `dump_stats_path`, of whichever model; None if it is not `required` and nothing is there.

    Raises:
        FP8MeasurementError: they are damaged, or required and missing.
    """
    if not Measurements.exist(config.dump_stats_path):
        _miss(config, required)
        return None
    return Measurements.load(config.dump_stats_path)


def stored_measurements(config: FP8Config, model: Measurements, *, required: bool) -> Measurements | None:
    """Measurements of this very model at `dump_stats_path`, or kept beside; None if not `required` and not there.

    Args:
        config: where to look, and which observer is expected.
        model: measurements of the model, which tell it from others.
        required: whether the model cannot do without.

    Raises:
        FP8MeasurementError: they are damaged, made by another observer, or required and missing.
    """
    path, stored = config.dump_stats_path, None
    places = [each for each in (path, kept_prefix(path, model.fingerprint)) if Measurements.exist(each)]
    if not places:
        _miss(config, required)
        return None
    for place in places:
        stored = Measurements.load(place)
        if stored.unlike(model) is None:
            if stored.observer != config.observer:
                raise FP8MeasurementError(
                    f"the measurements at dump_stats_path={place!r} were made by the observer {stored.observer!r}, but "
                    f"observer={config.observer!r}: set observer={stored.observer!r}, or measure again"
                )
            if not required or place != path:
                logger.warning("using the measurements of this model found at %r", place)
            return stored
    assert stored is not None
    message = (
        f"the measurements at dump_stats_path={path!r} are of another model ({stored.unlike(model)}): measure this "
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
