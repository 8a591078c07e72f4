"""FP8State: where a model stands between high precision and FP8, kept on the model so that each step finds the last."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import torch
from torch import nn

from ..config import FP8Config
from ..errors import FP8ConfigError, FP8StateError
from ..measure import Measurements, Observers, discard, model_fingerprint
from ..modules.handler import Change, Reason, Target, converted_modules
from ..selection import Decision
from .float8_training import refuse_float8_training
from .origin import Origin
from .replicated import keep_codes_out_of_broadcasts
from .sharded import common_fingerprint, refuse_zero3

MEASURED_BEFORE = "measurements"  # the source of ranges out of a file
_ATTRIBUTE = "_optimum_fp8_state"


class Phase(StrEnum):
    """Where a model stands; the value is how the report calls it."""

    MEASURING = "measuring"
    TRAINING = "training"
    CONVERTED = "converted"


@dataclass
class FP8State:
    """What has been decided about, measured on and done to a model.

    Attributes:
        config: what was asked for.
        decisions: one for every module of a known kind that the configuration is about.
        phase: measuring, training or converted.
        measurements: what calibration has seen (empty where none is needed).
        observers: the hooks at work while measuring.
        changes: what was changed around the modules, to be undone with them.
        origin: where the model was loaded from, where that is known.
        partials: the files that each calibration so far has left, to go on from if it is broken off.
        digests: of weights that became FP8 while loading, by parameter name, from when they were in high precision.
        moved: by which part of itself each range moved over the last quarter of the calibration samples.
        sources: the names of the data that calibration has seen.
        tokens: how many of them there were, without padding; 0 where data are no text.
        weight_scales: of weights that keep the scales they were trained with.
        provenance: what made the FP8 model, once it is one; empty where its checkpoint does not tell.
    """

    config: FP8Config
    decisions: list[Decision]
    phase: Phase
    measurements: Measurements
    observers: Observers | None = None
    changes: list[Change] = field(default_factory=list)
    origin: Origin | None = None
    partials: list[list[str]] = field(default_factory=list)
    digests: dict[str, str] = field(default_factory=dict)
    moved: dict[str, float] = field(default_factory=dict)
    sources: list[str] = field(default_factory=list)
    tokens: int = 0
    weight_scales: dict[nn.Parameter, torch.Tensor] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def selected(self) -> list[str]:
        """Names of the selected modules."""
        return [decision.name for decision in self.decisions if decision.selected]

    def discard_partials(self) -> None:
        """Remove the files of calibrations that could be broken off: what they were for has been done."""
        discard(path for files in self.partials for path in files)
        self.partials.clear()

    def fingerprint(self, model: nn.Module) -> str:
        """The fingerprint of `model` as it is now, in high precision."""
        return common_fingerprint(model, model_fingerprint(model, self.digests))

    def targets(self, model: nn.Module) -> list[Target]:
        """The selected modules of `model`, with their handlers, schemes and ranges."""
        selected = [each for each in self.decisions if each.selected]
        ranges = self.measurements.by_module(each.name for each in selected)
        return [
            Target(each.name, model.get_submodule(each.name), each.handler, each.scheme, ranges[each.name], model)
            for each in selected
        ]

    def change_around(self, model: nn.Module, targets: list[Target]) -> list[Change]:
        """Have the handlers change what the model around their modules needs, and remember what was changed."""
        others = [
            model.get_submodule(each.name) for each in self.decisions if each.why.reason is Reason.IMPLEMENTATION_CHOSEN
        ]
        changes: list[Change] = []
        for handler in {target.handler for target in targets}:
            modules = {target.name: target.module for target in targets if target.handler is handler}
            changes += handler.around(model, modules, others)
        self.changes += changes
        return changes


def unwrapped(model: nn.Module) -> nn.Module:
    """The module that DataParallel, DDP, FSDP or torch.compile was given; any other is returned as it is."""
    while isinstance(model, nn.Module):
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        elif inner := next(filter(None, map(model._modules.get, ("_orig_mod", "_fsdp_wrapped_module"))), None):
            model = inner
        else:
            break
    return model


def state_of(model: nn.Module) -> FP8State | None:
    """The state of `model`, None if nothing was done to it; that of what it wraps is not its own."""
    return model.__dict__.get(_ATTRIBUTE)


def set_state(model: nn.Module, state: FP8State | None) -> None:
    """Remember the state on the model; None forgets it."""
    keep_codes_out_of_broadcasts(model, converted=state is not None and state.phase is Phase.CONVERTED)
    if state is None:
        model.__dict__.pop(_ATTRIBUTE, None)
    else:
        model.__dict__[_ATTRIBUTE] = state


def measuring_state(model: nn.Module, action: str) -> FP8State:
    """The state of a model that is being measured.

    Raises:
        FP8StateError: nothing is measured on this model; the message says what comes first.
        FP8NotAvailableError: another library has replaced its layers since, to train in FP8.
    """
    state = state_of(model)
    if state is None:
        raise FP8StateError(f"{action}: this model is not being measured: call prepare(model, config) first")
    if state.phase is Phase.TRAINING:
        raise FP8StateError(
            f"{action}: this model is in quantization-aware training (fake_quant=True), which observes ranges by "
            "itself: train it, then convert(model)"
        )
    if state.phase is not Phase.MEASURING:
        raise FP8StateError(f"{action}: this model is already converted to FP8")
    refuse_float8_training(model, action)
    return state


def refuse_second_time(model: nn.Module, action: str, config: object = None) -> None:
    """Refuse what is no model in high precision, or no configuration.

    Raises:
        FP8StateError: no module, or one that is prepared or converted already.
        FP8ConfigError: `config` is there and no FP8Config.
        FP8NotAvailableError: its weights are cut into parts by ZeRO-3, or other libraries train it in FP8.
    """
    refuse_no_module(model, action)
    refuse_zero3(model, action)
    refuse_float8_training(model, action)
    if config is not None and not isinstance(config, FP8Config):
        raise FP8ConfigError(f"{action}: expected an FP8Config, found {config!r}: use FP8Config(…) or from_json_file")
    state = state_of(model)
    if state is None and not converted_modules(model):
        return
    if state is not None and state.phase is Phase.MEASURING:
        raise FP8StateError(f"{action}: this model is prepared already: run calibration data, then convert(model)")
    if state is not None and state.phase is Phase.TRAINING:
        raise FP8StateError(f"{action}: this model is in quantization-aware training: train it, then convert(model)")
    raise FP8StateError(f"{action}: this model is converted to FP8 already: load the original model to start again")


def refuse_no_module(model: object, action: str) -> None:
    """Refuse what is no module, a pipeline of diffusers with the names of its parts.

    Raises:
        FP8StateError: it is none.
    """
    if not isinstance(model, nn.Module):
        parts = [name for name, part in _components(model).items() if isinstance(part, nn.Module)]
        hint = f"; take its parts one by one: {', '.join(parts)}" if parts else ""
        raise FP8StateError(f"{action}: expected a torch.nn.Module, found {type(model).__name__}{hint}")


def _components(pipeline: object) -> dict[str, object]:
    """What a pipeline of diffusers consists of, by name; nothing of anything else."""
    found = getattr(pipeline, "components", None)
    return found if isinstance(found, dict) else {}
