"""From a model in high precision to one that is measured, and to its measurements."""

from __future__ import annotations

import logging

from torch import nn

from ..config import FP8Config
from ..errors import FP8MeasurementError, FP8StateError
from ..measure import Measurements, Observers, model_fingerprint
from ..modules.handler import find_all
from ..selection import select
from .state import FP8State, Phase, measuring_state, refuse_second_time, set_state

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
    """
    refuse_second_time(model, "prepare", config)
    config.post_init()  # keys may have been assigned since it was made
    decisions = select(model, config)
    measurements = Measurements(fingerprint(model), observer=config.observer)
    state = FP8State(config, decisions, Phase.MEASURING, measurements)
    start_observing(model, state)
    set_state(model, state)
    return model


def start_observing(model: nn.Module, state: FP8State) -> None:
    """Attach the observers that the schemes need (none where activations need no ranges)."""
    targets = state.targets(model)
    state.observers = Observers(state.measurements, state.config.measured)
    for target in targets:
        target.handler.observe(target, state.observers)
    state.change_around(model, [target for target in targets if target.scheme.needs_ranges])


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
        FP8MeasurementError: nothing was measured.
    """
    state = measuring_state(model, "finalize_calibration")
    observes = state.observers is None or state.observers.is_attached
    if needs_ranges(state) and observes and not saw_activations(state.measurements):
        raise FP8MeasurementError(
            "finalize_calibration: static activations need calibration data and none went through the model: run "
            "your data through it first"
        )
    path = state.measurements.save(state.config.dump_stats_path)
    if state.observers is not None:
        state.observers.remove()
    state.observers = None
    logger.info("measurements of %d tensors are in %s", len(state.measurements.tensors), path)
    return state.measurements


def unmeasured_state(model: nn.Module, config: FP8Config) -> FP8State:
    """The state of a model that was not prepared: measurements come from the file, where there is one."""
    config.post_init()
    state = FP8State(config, select(model, config), Phase.MEASURING, Measurements(fingerprint(model)))
    if needs_ranges(state):
        required = config.scheme == "static" or config.mode == "QUANTIZE"
        stored = stored_measurements(config, state.measurements.fingerprint, required=required)
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


def stored_measurements(config: FP8Config, fingerprint: str, *, required: bool) -> Measurements | None:
    """Measurements of this very model at `dump_stats_path`; None where they are not `required` and not there.

    Raises:
        FP8MeasurementError: they are damaged, made by another observer, or required and missing or of another model.
    """
    if not required and not Measurements.exist(config.dump_stats_path):
        return None
    stored = Measurements.load(config.dump_stats_path)
    if stored.observer != config.observer:
        raise FP8MeasurementError(
            f"the measurements at dump_stats_path={config.dump_stats_path!r} were made by the observer "
            f"{stored.observer!r}, but observer={config.observer!r}: set observer={stored.observer!r}, or measure again"
        )
    if stored.fingerprint == fingerprint:
        if not required:
            logger.warning("using the measurements of this model found at %r", config.dump_stats_path)
        return stored
    message = (
        f"the measurements at dump_stats_path={config.dump_stats_path!r} are of another model (fingerprint "
        f"{stored.fingerprint}, this model has {fingerprint}): measure this model, or correct dump_stats_path"
    )
    if required:
        raise FP8MeasurementError(message)
    logger.warning("%s; they are not used", message)
    return None
