"""What made a checkpoint of ours, out of the record in its files: versions, day, data, ranges, what was left out.

The record is the metadata of each safetensors file, so provenance goes where the weights go: through `save_pretrained`,
loading and saving again, `save`, `quantize_files`, and into every shard.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from ..errors import FP8CheckpointError, FP8StateError
from ..lifecycle import FP8State, Phase, loaded_for, provenance_in, state_of, unwrapped
from ..modules.handler import converted_modules
from ..selection import with_limits
from .folder import CONFIG_FILE, DIFFUSERS, PLAIN, Layout, read_config, read_json
from .intact import read_record, recorded
from .names import name_of
from .native import carried_config
from .ranges import known_ranges

_OF_TRANSFORMERS = Layout(DIFFUSERS.config_file, DIFFUSERS.key, PLAIN.weights)
_KEYS: Mapping[str, type] = {"made_with": dict, "date": str, "skipped": dict, "data": dict, "changes": list}


def provenance_of(model: nn.Module | str | os.PathLike[str]) -> dict[str, Any]:
    """What made an FP8 model, or a folder that one was saved to, as JSON; what is not known is empty.

    Args:
        model: a converted model, or the folder of a checkpoint of ours.

    Returns:
        "made_with": the versions of "optimum_fp8", "torch" and "transformers";
        "date": the day on which it was converted, as 2026-11-30, in UTC;
        "config": the FP8Config that it carries;
        "data": of the calibration: "source" (a name, no path), "samples", "tokens", "fingerprint" of the data,
        "observer", and "model_fingerprint" of the model in high precision; empty where no scale follows from data;
        "modules": for each module in FP8 the ranges that its static scales follow from, by tensor; empty without any;
        "skipped": why modules of kinds that can be quantized are not, by name;
        "changes": what was done to it since, the first first: each has "what", "date" and "made_with", and more.

    Raises:
        FP8StateError: the model is not converted.
        FP8CheckpointError: the folder holds no checkpoint of ours, or one that is damaged.
    """
    if isinstance(model, nn.Module):
        inner = unwrapped(model)
        state = state_of(inner)
        if state is None or state.phase is not Phase.CONVERTED:
            raise FP8StateError(
                f"provenance_of: {type(inner).__name__} is not converted to FP8: expected a model in FP8, or the "
                "folder that one was saved to"
            )
        names = [name_of(name) for name in converted_modules(inner)]
        ranges, config = known_ranges(inner), _config(inner, state)
        return _told(state.provenance, config, names, ranges)
    folder = os.fspath(model)
    said, record = read_config(folder, _layout(folder)), record_in(folder)
    names = [*record.get("modules", []), *record.get("scales", {})]
    return _told(recorded_provenance(record), said.to_dict(), names, record.get("ranges", {}))


def record_in(folder: str) -> dict[str, Any]:
    """The record of a checkpoint in a folder, whoever wrote it: in its files, or in the index of them; else empty.

    Raises:
        FP8CheckpointError: it is damaged, or of a newer format.
    """
    names = sorted(os.listdir(folder))
    if said := recorded([os.path.join(folder, name) for name in names]):
        return said
    for path in (os.path.join(folder, name) for name in names if name.endswith(".safetensors.index.json")):
        if "modules" in (said := read_record(path, read_json(path).get("metadata"))):
            return said
    return {}


def recorded_provenance(
    record: Mapping[str, Any], made_for: str | None = None, target: str | None = None
) -> dict[str, Any]:
    """The provenance in a record; with `target`, of what is loaded for that, though it may be made for another.

    Raises:
        FP8CheckpointError: it cannot be read.
    """
    found = record.get("provenance", {})
    if not isinstance(found, dict) or not all(isinstance(found.get(key, kind()), kind) for key, kind in _KEYS.items()):
        raise FP8CheckpointError(
            f"the provenance in the record of the checkpoint cannot be read ({str(found)[:80]}): the checkpoint was "
            "edited or mixed from others: save it again"
        )
    return dict(found) if made_for is None or target is None else loaded_for(found, made_for, target)


def told_of(model: nn.Module) -> dict[str, Any]:
    """What the record of a model says that follows from its state, for `record`: ranges and provenance, if known."""
    told = {"ranges": known_ranges(model), "provenance": provenance_in(model)}
    return {name: value for name, value in told.items() if value}


def _layout(folder: str) -> Layout:
    """Which file of a folder holds the configuration: ours, or that of transformers and diffusers."""
    plain = os.path.isfile(os.path.join(folder, CONFIG_FILE))
    other = os.path.isfile(os.path.join(folder, _OF_TRANSFORMERS.config_file))
    return _OF_TRANSFORMERS if other and not plain else PLAIN


def _config(model: nn.Module, state: FP8State) -> dict[str, Any]:
    selected = [(each.names, each.types) for each in state.decisions if each.selected]
    left_out = [each.name for each in state.decisions if not each.selected]
    config = with_limits(state.config, state.decisions)
    return carried_config(config, selected, left_out, type(model).__name__).to_dict()


def _told(
    provenance: Mapping[str, Any], config: dict[str, Any], names: Sequence[str], ranges: Mapping[str, Any]
) -> dict[str, Any]:
    return {
        "made_with": provenance.get("made_with", {}),
        "date": provenance.get("date", ""),
        "config": config,
        "data": provenance.get("data", {}),
        "modules": {name: dict(ranges.get(name, {})) for name in sorted(names)},
        "skipped": provenance.get("skipped", {}),
        "changes": provenance.get("changes", []),
    }
