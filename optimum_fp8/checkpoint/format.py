"""Checkpoint formats: neutral records of a converted model, and what a format makes of them.

A format is a class with four methods, `refuse`, `tensors`, `config` and `records`, registered by name. What handlers
yield is the same for all formats: the tensors of each module in memory, under the names they have below it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from safetensors.torch import save_file
from torch import nn

from ..config import FP8Config
from ..errors import FP8ConfigError, FP8NotAvailableError, FP8StateError, nearest
from ..lifecycle import Phase, state_of
from ..modules.handler import converted_modules
from ..scales import Scheme
from ..selection import with_limits
from .digests import RECORD, sealed, signed
from .whole_folder import whole_folder


@dataclass(frozen=True)
class Record:
    """One converted module.

    Attributes:
        name: its qualified name.
        kind: its handler's kind.
        scheme: how it is scaled and computed.
        tensors: codes, scales and what else it has, by name below the module, as they are in memory.
        stores_in_out: whether the weight in the checkpoint is that of a class which keeps it as `[in, out]`.
    """

    name: str
    kind: str
    scheme: Scheme | None
    tensors: dict[str, torch.Tensor]
    stores_in_out: bool = False


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint says of a model, whatever its format.

    Attributes:
        records: one a converted module.
        selected: names and types of the converted modules.
        left_out: names of modules that stay in high precision although the configuration is about their kind.
        config: what the model was quantized with; None where a file does not say it.
        aliases: names of modules in the model, by those on disk that `records` and `left_out` have, where they differ.
    """

    records: list[Record]
    selected: list[tuple[tuple[str, ...], tuple[str, ...]]]
    left_out: list[str]
    config: FP8Config | None
    aliases: Mapping[str, str] = field(default_factory=dict)

    def all_names(self, names: Iterable[str]) -> list[str]:
        """Names on disk with those in the model, sorted: some engines look for these, and some for the others."""
        return sorted({each for name in names for each in (name, self.aliases.get(name, name))})


class Format(Protocol):
    """A checkpoint format; the same four names in each file."""

    def refuse(self, checkpoint: Checkpoint) -> None:
        """Raise FP8CheckpointError, naming module and feature, for what this format cannot express."""

    def tensors(self, checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
        """The tensors of the converted modules as they go to disk, by their full names there."""

    def config(self, checkpoint: Checkpoint) -> dict[str, Any]:
        """What `config.json` says under "quantization_config"."""

    def records(self, files: Sequence[str]) -> Checkpoint:
        """Read what is in the files of a checkpoint, without its data where that can be."""


@runtime_checkable
class FormatWithFiles(Format, Protocol):
    """A checkpoint format that has files of its own beside `config.json`."""

    def files(self, checkpoint: Checkpoint) -> dict[str, dict[str, Any]]:
        """What they say, as JSON, by the names of the files."""


FORMATS: dict[str, Format] = {}


def register_format(name: str, format: Format) -> None:
    """Make a format known by `name`; one of the same name is replaced."""
    FORMATS[name] = format


def format_called(name: str) -> Format:
    """The format called `name`.

    Raises:
        FP8ConfigError: there is none; the message names the nearest.
    """
    if name not in FORMATS:
        raise FP8ConfigError(f"format={name!r} is unknown: {nearest(name, FORMATS)}")
    return FORMATS[name]


def checkpoint_of(model: nn.Module) -> Checkpoint:
    """The records of a converted model.

    Raises:
        FP8StateError: the model is still being measured, or not converted.
        FP8NotAvailableError: weights are offloaded.
    """
    state = state_of(model)
    if state is not None and state.phase is Phase.MEASURING:
        raise FP8StateError("the model is in measuring state: run your data, then convert(model), before it is saved")
    if state is not None and state.phase is Phase.TRAINING:
        raise FP8StateError("the model is in quantization-aware training: convert(model) before it is saved in FP8")
    records = []
    schemes = {each.name: each.scheme for each in state.decisions} if state is not None else {}
    for name, (module, handler) in converted_modules(model).items():
        tensors = handler.state(module)
        if any(tensor.is_meta for tensor in tensors.values()):
            raise FP8NotAvailableError(f"{name} is offloaded: load the model without offloading, to save it")
        records.append(Record(name, handler.kind, schemes.get(name), tensors))
    if not records:
        raise FP8StateError("the model is not converted to FP8: call convert(model, config) before it is saved")
    decisions = state.decisions if state is not None else []
    selected = [(each.names, each.types) for each in decisions if each.selected]
    left_out = [each.name for each in decisions if not each.selected]
    config = None if state is None else with_limits(state.config, decisions)
    return Checkpoint(records, selected, left_out, config)


def write(model: nn.Module, folder: str | os.PathLike[str], format: str) -> None:
    """Write the converted modules of a model in a registered format: `model.safetensors` and `quantization.json`.

    The folder is made beside its place and moved there, so it is whole or not there.

    Raises:
        FP8CheckpointError: the format cannot express the model, or the folder exists.
    """
    chosen, checkpoint = format_called(format), checkpoint_of(model)
    chosen.refuse(checkpoint)
    with whole_folder(folder) as temporary:
        tensors = {name: tensor.detach().contiguous() for name, tensor in chosen.tensors(checkpoint).items()}
        if tensors:
            metadata = {"format": "pt", RECORD: signed(sealed(tensors, format))}
            save_file(tensors, os.path.join(temporary, "model.safetensors"), metadata=metadata)
        with open(os.path.join(temporary, "quantization.json"), "w", encoding="utf-8") as file:
            json.dump(chosen.config(checkpoint), file, indent=2)
