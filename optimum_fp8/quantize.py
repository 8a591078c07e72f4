"""prepare → your calibration loop → finalize_calibration → convert, on any nn.Module.

`from_pretrained`, the command line and everything else walk these same steps.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import transformers
from torch import nn

from .config import FP8Config
from .errors import FP8ConfigError, FP8MeasurementError, FP8NotAvailableError, FP8ScaleError, FP8StateError
from .measure import Measurements, Observers, TensorStatistics, model_fingerprint
from .modules import FP8Module, fp8_modules, fp8_skeleton, quantize_weight, recipe_for, swap
from .quantize_attention import (
    ATTENTION_RANGES,
    convert_attention,
    missing_ranges,
    restore_attention,
    start_observing_attention,
    without_missing,
)
from .scales import activation_scale
from .selection import candidates, select
from .selection_attention import select_attention
from .state import FP8State, measuring_state, set_state, state_of, without

logger = logging.getLogger(__name__)


def prepare(model: nn.Module, config: FP8Config) -> nn.Module:
    """Put `model` into measuring state: run calibration data through it next, then `convert(model)`.

    Args:
        model: any module with Linear, Conv1D or Conv2d layers; only hooks are added, and only on selected modules.
        config: what to quantize and how.

    Returns:
        `model` itself.

    Raises:
        FP8StateError: the model is prepared or converted already.
        FP8SelectionError: a pattern of the config matches nothing, or nothing is selected.
    """
    _refuse_second_time(model, "prepare", config)
    config.post_init()  # keys may have been assigned since it was made
    decisions, found = select(model, config), candidates(model)
    state = FP8State(config, decisions, "measuring", Measurements(_fingerprint(model)))
    state.attention = select_attention(model, config, decisions)
    if "weight" in config.measured:
        for name in state.selected:
            state.measurements.observe(name, "weight", TensorStatistics.of(found[name].weight))
    start_observing(model, state)
    set_state(model, state)
    return model


def start_observing(model: nn.Module, state: FP8State) -> None:
    """Attach the observers a state's config asks for (none where activations need no ranges)."""
    state.observers = Observers(state.measurements)
    if needs_ranges(state.config):
        modules = {name: model.get_submodule(name) for name in state.selected}
        state.observers.attach(modules, state.config.measured)
        start_observing_attention(model, state)


def needs_ranges(config: FP8Config) -> bool:
    """Whether activations of this config are scaled by calibrated ranges."""
    return config.scheme in ("static", "auto") and config.method.activation.needs_range


def finalize_calibration(model: nn.Module) -> Measurements:
    """End measuring: take the observers off and write the measurements to the config's `dump_stats_path`.

    Returns:
        the measurements. `convert(model)` uses them as they are in memory; another process finds the file.

    Raises:
        FP8StateError: the model is not being measured.
        FP8MeasurementError: nothing was measured.
    """
    state = measuring_state(model, "finalize_calibration")
    expected = {"input", "output"}.intersection(state.config.measured) if needs_ranges(state.config) else set()
    expected |= set(ATTENTION_RANGES) if expected and state.config.wants_attention else set()
    if expected and not any(kind in expected for _, kind in state.measurements.tensors):
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


def convert(model: nn.Module, config: FP8Config | None = None) -> nn.Module:
    """Turn `model` into an FP8 model.

    A model in measuring state is converted with what was measured. Otherwise `config` is needed, and static
    activations are converted with the measurements at its `dump_stats_path`, if they are of this very model; with
    `activation_scheme="auto"` and no such measurements, activations become dynamic.

    An error leaves the model as it was.

    Args:
        model: a prepared model, or any module with Linear, Conv1D or Conv2d layers.
        config: what to quantize and how, for a model that was not prepared.

    Returns:
        `model` itself.

    Raises:
        FP8StateError: converted already, or neither prepared nor given a config.
        FP8MeasurementError: static activations without calibration data, modules that calibration never reached, or
            measurements of another model.
        FP8ScaleError: a weight that has no sound scale.
    """
    from .hf.attach import attach_quantizer

    state = state_of(model) if isinstance(model, nn.Module) else None
    if state is None or state.phase == "converted":
        _refuse_second_time(model, "convert", config)
        if config is None:
            raise FP8StateError("convert: this model was not prepared: call prepare(model, config), or pass a config")
        state = _unmeasured_state(model, config)
    elif config is not None and config != state.config:
        raise FP8StateError("convert: this model was prepared with another config: leave the argument out")
    convert_with(model, state, attach_quantizer if isinstance(model, transformers.PreTrainedModel) else None)
    return model


def convert_with(model: nn.Module, state: FP8State, finish: Callable[[Any], None] | None = None) -> None:
    """Convert with what `state` knows, then call `finish(model)`; an error leaves the model as it was."""
    config, found, previous = state.config, dict(model.named_modules()), state_of(model)
    telling = ("input", *ATTENTION_RANGES) if config.wants_attention else ("input",)
    saw_inputs = any(kind in telling for _, kind in state.measurements.tensors)
    if needs_ranges(config):
        if config.scheme == "auto" and not saw_inputs and (state.observers is None or "input" not in config.measured):
            config = config.replace(activation_scheme="dynamic")
            logger.warning("no calibration data: activations are scaled dynamically (activation_scheme='dynamic')")
        elif not saw_inputs:
            raise FP8MeasurementError(
                "static activations need calibration data and none went through the model: run your data through it "
                "after prepare(), give a `dataset`, or use activation_scheme='dynamic'"
            )
    unreached = _unreached(state, config) if needs_ranges(config) else {}
    unseen = missing_ranges(model, state, config)
    _warn_of_zero_ranges(state, config)
    recipe = recipe_for(config, dynamic=config.scheme == "dynamic")
    input_scales = {name: _input_scale(name, state, config) for name in state.selected if name not in unreached}
    replacements = {found[name]: new for name, new in _quantized_modules(found, state, config, unreached).items()}
    converted = replace(
        state,
        config=config,
        phase="converted",
        observers=None,
        decisions=without(state.decisions, unreached),
        attention=without_missing(state, unseen),
    )

    before = [(module, module.recipe, module.input_scale) for module in fp8_modules(model).values()]
    undo_attention = convert_attention(model, state, config, unseen)
    swap(model, replacements)
    set_state(model, converted)
    modules = fp8_modules(model)
    for name, input_scale in input_scales.items():
        modules[name].start(recipe, input_scale)
    try:
        if finish is not None:
            finish(model)
    except BaseException:
        swap(model, {new: old for old, new in replacements.items()})
        for module, old_recipe, old_scale in before:
            module.start(old_recipe, old_scale)
        undo_attention()
        set_state(model, previous)
        raise
    if state.observers is not None:
        state.observers.remove()


def _unmeasured_state(model: nn.Module, config: FP8Config) -> FP8State:
    """The state of a model that was not prepared: measurements come from the file, where there is one."""
    config.post_init()
    decisions = select(model, config)
    measurements = Measurements(_fingerprint(model))
    if needs_ranges(config):
        required = config.scheme == "static" or config.mode == "QUANTIZE"
        measurements = stored_measurements(config, measurements.fingerprint, required=required) or measurements
    return FP8State(config, decisions, "measuring", measurements, attention=select_attention(model, config, decisions))


def _fingerprint(model: nn.Module) -> str:
    offloaded = [name for name, module in candidates(model).items() if module.weight.device.type == "meta"]
    if offloaded:
        raise FP8StateError(
            f"the weights of {len(offloaded)} modules ({', '.join(offloaded[:3])}, …) are offloaded or not loaded: "
            "quantize while loading, with from_pretrained(…, quantization_config=…)"
        )
    return model_fingerprint(model)


def stored_measurements(config: FP8Config, fingerprint: str, *, required: bool) -> Measurements | None:
    """Measurements of this very model at `dump_stats_path`; None where they are not `required` and not there.

    Raises:
        FP8MeasurementError: they are damaged, or required and missing or of another model.
    """
    if not required and not Measurements.exist(config.dump_stats_path):
        return None
    stored = Measurements.load(config.dump_stats_path)
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


def dequantize(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Put modules of the original classes, with dequantized weights, in place of the FP8 modules of `model`.

    Args:
        model: a converted model (transformers models have this as `model.dequantize()`).
        dtype: of the weights; by default the one they had.

    Returns:
        `model` itself.

    Raises:
        FP8NotAvailableError: some weights are offloaded.
    """
    modules, state = fp8_modules(model), state_of(model)
    if any(module.weight.device.type == "meta" for module in modules.values()):
        raise FP8NotAvailableError("dequantize: some weights are offloaded: load the model without offloading")
    if state is not None and state.observers is not None:
        state.observers.remove()
    swap(model, {module: module.restored(dtype) for module in modules.values()})
    restore_attention(model, state)
    set_state(model, None)
    return model


def _refuse_second_time(model: nn.Module, action: str, config: object = None) -> None:
    if not isinstance(model, nn.Module):
        raise FP8StateError(f"{action}: expected a torch.nn.Module, found {type(model).__name__}")
    if config is not None and not isinstance(config, FP8Config):
        raise FP8ConfigError(f"{action}: expected an FP8Config, found {config!r}: use FP8Config(…) or from_json_file")
    state = state_of(model)
    if state is None and not fp8_modules(model):
        return
    if state is not None and state.phase == "measuring":
        raise FP8StateError(f"{action}: this model is prepared already: run calibration data, then convert(model)")
    raise FP8StateError(f"{action}: this model is converted to FP8 already: load the original model to start again")


def _unreached(state: FP8State, config: FP8Config) -> dict[str, str]:
    """Selected modules without a range. Raises unless the config ignores them."""
    missing = [name for name in state.selected if (name, "input") not in state.measurements.tensors]
    if missing and not config.ignore_modules_wo_measures:
        raise FP8MeasurementError(
            f"{len(missing)} selected modules were never reached by calibration: {', '.join(missing[:8])}"
            f"{', …' if len(missing) > 8 else ''}: calibrate with data that reaches them, put them on the blocklist, "
            "or set ignore_modules_wo_measures=True"
        )
    if missing:
        logger.warning("not reached by calibration, activations stay in high precision: %s", ", ".join(missing))
    return {name: "never reached by calibration" for name in missing}


def _warn_of_zero_ranges(state: FP8State, config: FP8Config) -> None:
    """A tensor that was always zero says nothing of what it may hold later."""
    if needs_ranges(config):
        ranges = {name: state.measurements.maxabs(name) for name in state.selected}
        zero = [name for name, maxabs in ranges.items() if maxabs is not None and maxabs == 0]
        if zero:
            logger.warning("inputs that were zero throughout calibration: %s; calibrate with other data", zero[:8])


def _input_scale(name: str, state: FP8State, config: FP8Config) -> torch.Tensor | None:
    """The static scale of a module's input, `(1,)` float32; None for dynamic and weight-only activations."""
    if config.scheme in ("dynamic", "weight_only"):
        return None
    maxabs = state.measurements.maxabs(name) if needs_ranges(config) else torch.zeros(())
    assert maxabs is not None  # unreached modules have been sorted out
    return activation_scale(
        maxabs,
        method=config.scale_method,
        target=config.resolved_target,
        fp8_config=config.fp8_config,
        hp_dtype=config.hp_dtype,
        backoff=config.input_backoff,
    )


def _quantized_modules(
    found: dict[str, Any], state: FP8State, config: FP8Config, unreached: dict[str, str]
) -> dict[str, nn.Module]:
    """What takes the place of which module: FP8 modules, still without input scale, for the selected ones.

    Modules whose weights became FP8 while loading stay; those calibration never reached go back to high precision.
    """
    replacements: dict[str, nn.Module] = {}
    by_weight: dict[int, FP8Module] = {}
    recipe = recipe_for(config, dynamic=config.scheme == "dynamic")
    for name in state.selected:
        module = found[name]
        if isinstance(module, FP8Module):
            if name in unreached:
                replacements[name] = module.restored()
        elif name not in unreached:
            fp8 = fp8_skeleton(module, recipe, name)
            twin = by_weight.setdefault(id(module.weight), fp8)
            if twin is fp8:
                fp8.set_weight(*_codes_and_scale(name, fp8.canonical(module.weight.detach()), config))
            else:  # tied weights stay tied
                fp8.weight, fp8.weight_scale = twin.weight, twin.weight_scale
            replacements[name] = fp8
    return replacements


def _codes_and_scale(name: str, weight: torch.Tensor, config: FP8Config) -> tuple[torch.Tensor, torch.Tensor]:
    try:
        return quantize_weight(weight, config, config.number_format)[:2]
    except FP8ScaleError as error:
        raise FP8ScaleError(f"{name}: {error}") from None
