"""A checkpoint of ours that is to be scaled in another way: its model, in memory, and how it is written again."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedModel

from ..checkpoint.folder import config_of_transformers
from ..checkpoint.whole_folder import whole_folder
from ..commands.companions import copy_companions
from ..config import FP8Config
from ..errors import FP8CheckpointError, FP8ConfigError, FP8MeasurementError
from ..files.skeleton import class_saved
from ..lifecycle import FP8State, state_of
from ..modules.handler import Target, converted_modules
from ..selection import reschemed
from .weights import Added, Rescaled

CONFIG = "config.json"


@dataclass(frozen=True)
class Rewritten:
    """What became of a checkpoint.

    Attributes:
        output: the folder of the new one.
        config: the configuration that it carries.
        rows: what became of the weights of each module; empty where they were quantized from the original.
        original: the model in high precision that they were quantized from, where one was given.
    """

    output: str
    config: FP8Config
    rows: Sequence[Added]
    original: str = ""

    @property
    def rounded(self) -> list[Added]:
        """The modules with weights that were rounded again, the largest error first."""
        return sorted((row for row in self.rows if row.rounded), key=lambda row: -row.error)

    @property
    def error(self) -> float:
        """The largest error that was added to a module's weights; 0.0: none was."""
        return max((row.error for row in self.rows), default=0.0)

    def change(self) -> dict[str, Any]:
        """What provenance says of it."""
        if self.original:
            return {"original": os.path.basename(os.path.normpath(self.original))}
        return {"modules_rounded_again": len(self.rounded), "largest_added_error": round(self.error, 6)}


def open_checkpoint(folder: str) -> tuple[PreTrainedModel, FP8State]:
    """The FP8 model in a folder, for the target that it was made for, and its state.

    Raises:
        FP8CheckpointError: there is none of ours, or it is damaged.
    """
    said = config_of_transformers(folder)
    target = FP8Config.from_dict(said["quantization_config"]).resolved_target
    model = class_saved(folder, said).from_pretrained(folder, quantization_config=FP8Config(target=target))
    state = state_of(model)
    assert state is not None
    return model, state


def with_keys(config: FP8Config, keys: Mapping[str, Any]) -> FP8Config:
    """The configuration of a checkpoint with other keys, which hold for all of its modules.

    Raises:
        FP8ConfigError: they do not go together.
    """
    rest = {
        pattern: {name: value for name, value in said.items() if name not in keys}
        for pattern, said in config.overrides.items()
    }
    return config.replace(**keys, overrides={pattern: said for pattern, said in rest.items() if said})


def refuse_unchanged(step: str, before: FP8Config, after: FP8Config, keys: Mapping[str, Any], advice: str) -> None:
    """Refuse keys that a checkpoint has already: what came out would be a copy.

    Raises:
        FP8ConfigError: it has all of them.
    """
    if before.to_dict() == after.to_dict():
        said = ", ".join(f"{name}={value!r}" for name, value in keys.items())
        raise FP8ConfigError(f"{step}: nothing to change: the checkpoint has {said} already: {advice}")


def rescheme(model: PreTrainedModel, state: FP8State, config: FP8Config, folder: str, advice: str) -> list[Added]:
    """Scale all modules of a converted model as a configuration says, in place.

    Args:
        model: converted.
        state: of it; its ranges are those that static scales are made from.
        config: what it is to be from now on.
        folder: that it is from, for messages.
        advice: what to do where ranges are missing.

    Returns:
        what became of the weights of each module that has some.

    Raises:
        FP8MeasurementError: ranges are missing; nothing has been changed.
        FP8CheckpointError: a module cannot be scaled so; nothing has been changed.
        FP8NotAvailableError: a kind of module that cannot change its scales.
    """
    decisions = reschemed(model, state.decisions, config, calibrated=True)
    schemes = {each.name: each.scheme for each in decisions}
    targets = [replace(each, scheme=schemes[each.name]) for each in _targets(model, state)]
    _check(targets, folder, advice)
    fit = Rescaled()
    for target in targets:
        fit.start(target.name)
        target.handler.rescheme(target, fit)
    state.config, state.decisions = config, decisions
    return [row for row in fit.rows if row.weights]


def _targets(model: PreTrainedModel, state: FP8State) -> list[Target]:
    converted = converted_modules(model)
    return [each for each in state.targets(model) if each.name in converted]


def _check(targets: Sequence[Target], folder: str, advice: str) -> None:
    """Refuse what cannot be done, before anything is."""
    for target in targets:
        granularity, dimensions = target.scheme.weight.granularity, len(getattr(target.module, "weight_shape", (0, 0)))
        if granularity.matrices_only and dimensions != 2:
            raise FP8CheckpointError(
                f"{target.name}: its weight of {dimensions} dimensions cannot be scaled {granularity}: choose a "
                "method with scales per tensor or per channel"
            )
    missing = [each.name for each in targets if each.scheme.needs_ranges and each.handler.missing(each) is not None]
    if missing:
        raise FP8MeasurementError(
            f"the record of {folder} holds no ranges of {len(missing)} modules ({', '.join(missing[:4])}"
            f"{', …' if len(missing) > 4 else ''}), which static scales follow from: {advice}"
        )


def write_checkpoint(model: PreTrainedModel, source: str, output: str, max_shard_size: int | str) -> None:
    """Save a model, with what stands beside the weights in `source`; the folder is whole or not there."""
    with whole_folder(output) as temporary:
        model.save_pretrained(temporary, max_shard_size=max_shard_size)
        copy_companions(source, temporary, apart_from=os.path.abspath(output))


def refuse_existing(output: str) -> None:
    """Refuse an output that is there, before anything long is begun.

    Raises:
        FP8CheckpointError: it is.
    """
    if os.path.exists(output):
        raise FP8CheckpointError(f"{os.path.abspath(output)} exists: choose another folder")
