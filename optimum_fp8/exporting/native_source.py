"""A checkpoint of ours as the source of an export: its layers, their schemes and scales, and where its tensors lie."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..checkpoint import Checkpoint, Record
from ..checkpoint.digests import SAVE
from ..checkpoint.folder import config_of_transformers
from ..checkpoint.intact import check_saved, recorded
from ..checkpoint.names import names_in_model
from ..checkpoint.native import SCALE
from ..errors import FP8CheckpointError
from ..files.skeleton import class_saved
from ..files.source import Stored, reading, tensors_in
from ..formats import is_fp8
from ..lifecycle import state_of
from ..measure import Observer
from ..modules.experts import SCALES
from ..modules.fused_experts import FP8FusedExperts
from ..modules.handler import converted_modules
from ..selection import Decision

CONFIG = "config.json"


@dataclass(frozen=True)
class NativeSource:
    """A folder that a converted model of transformers was saved to.

    Attributes:
        folder: where it is.
        config: what its `config.json` says.
        files: paths of the files with weights.
        stored: where each tensor lies, by its name on disk.
        parts: where the tensors of each record of the checkpoint lie, by the names they have in it.
        checkpoint: a record for each layer and attention module, by its name on disk; weights are on meta.
        decisions: about the module of the model that a record is of, by the record's name.
        ranges: that the scales follow from, by module of the model and tensor, as far as they are recorded.
        saved: the id of the save; None where it is older.
    """

    folder: str
    config: dict[str, Any]
    files: list[str]
    stored: dict[str, Stored]
    parts: dict[str, dict[str, Stored]]
    checkpoint: Checkpoint
    decisions: dict[str, Decision]
    ranges: dict[tuple[str, str], Observer]
    saved: str | None


def open_native(folder: str | os.PathLike[str]) -> NativeSource:
    """Read what a folder says of its model, and all of its scales.

    Raises:
        FP8CheckpointError: it holds no FP8 checkpoint of a model of transformers, or one that is damaged.
    """
    folder = os.path.abspath(folder)
    config = config_of_transformers(folder)
    files, stored = tensors_in(folder)
    check_saved(files)
    model = class_saved(folder, config).from_pretrained(folder, device_map="meta")
    state = state_of(model)
    assert state is not None
    _refuse_stacks(stored)
    parts = _parts(stored)
    records, decisions = _records(model, {each.name: each for each in state.decisions}, parts)
    left_out = _left_out(model, state.decisions, records, stored)
    whole = Checkpoint(records, [], left_out, state.config, _aliases(model, stored))
    saved, ranges = recorded(files).get(SAVE), state.measurements.tensors
    return NativeSource(folder, config, files, stored, parts, whole, decisions, ranges, saved)


def _parts(stored: Mapping[str, Stored]) -> dict[str, dict[str, Stored]]:
    """Codes and scales by the layer or attention module on disk that they belong to."""
    parts: dict[str, dict[str, Stored]] = {}
    for key, each in stored.items():
        if match := SCALE.match(key):
            parts.setdefault(match[1], {})[match[2]] = each
        elif key.endswith(".weight") and each.dtype is not None and is_fp8(each.dtype):
            parts.setdefault(key.removesuffix(".weight"), {})["weight"] = each
    return parts


def _records(
    model: Any, decisions: Mapping[str, Decision], parts: Mapping[str, dict[str, Stored]]
) -> tuple[list[Record], dict[str, Decision]]:
    """The records of a checkpoint, and the decision about the module that each is of."""
    converted, records = converted_modules(model), []
    keys = {name: next(iter(tensors.values())).key for name, tensors in parts.items()}
    in_model = names_in_model(model, keys.values())
    owners = {name: _owner(in_model[key], converted) for name, key in keys.items()}
    with reading() as read:
        of_experts = {
            owners[name]: {part: read(each) for part, each in stored.items()}
            for name, stored in parts.items()
            if isinstance(converted[owners[name]][0], FP8FusedExperts) and "weight" not in stored
        }
        for name, stored in parts.items():
            owner = owners[name]
            if owner in of_experts and "weight" not in stored:
                continue
            module, handler = converted[owner]
            tensors = {
                part: torch.empty(each.shape[1:], dtype=each.dtype, device="meta") if part == "weight" else read(each)
                for part, each in stored.items()
            }
            if isinstance(module, FP8FusedExperts):
                tensors |= _input_of_expert(name, module.parts, of_experts.get(owner, {}))
            in_out = bool(getattr(module, "stores_in_out", False))
            records.append(Record(name, handler.kind, decisions[owner].scheme, tensors, in_out))
    without = [name for name, (module, handler) in converted.items() if not handler.state(module)]
    records += [Record(name, converted[name][1].kind, decisions[name].scheme, {}) for name in without]
    return records, {record.name: decisions[owners.get(record.name, record.name)] for record in records}


def _input_of_expert(name: str, parts: Sequence[str], scales: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The scale of the input of one weight of one expert, of those that we keep for all experts of a layer.

    Args:
        name: of the weight's place on disk, `….experts.0.w1`.
        parts: the names of an expert's weights, the last one's down.
        scales: `input_scale` and `intermediate_scale`, one or one an expert; empty where they are not static.
    """
    *_, expert, part = name.split(".")
    scale = scales.get(SCALES[1] if part == parts[-1] else SCALES[0])
    if scale is None:
        return {}
    return {"input_scale": scale.reshape(-1)[int(expert) if scale.numel() > 1 else 0].reshape(1).clone()}


def _refuse_stacks(stored: Mapping[str, Stored]) -> None:
    for key, each in stored.items():
        if each.dtype is not None and is_fp8(each.dtype) and not key.endswith(".weight"):
            raise FP8CheckpointError(
                f"{key} holds the experts of a layer as one stack, as checkpoints of this architecture do, but engines "
                "expect FP8 experts one by one: quantize with modules_to_not_convert=['experts']"
            )


def _owner(name: str, converted: Mapping[str, Any]) -> str:
    """The converted module that a tensor belongs to: it may be one of the weights that the module has stacked."""
    parts = name.split(".")
    for depth in range(len(parts) - 1, 0, -1):
        if (found := ".".join(parts[:depth])) in converted:
            return found
    raise FP8CheckpointError(f"{name} is in the checkpoint, but no module in FP8 of the model has it: save it again")


def _left_out(model: Any, decisions: list[Decision], records: list[Record], stored: Mapping[str, Stored]) -> list[str]:
    """What engines must not quantize: matrices in high precision, and layers that have no tensor of their own."""
    in_fp8 = {record.name for record in records}
    matrices = {key.removesuffix(".weight") for key, each in stored.items() if _is_matrix(key, each)}
    kept = {each.name for each in decisions if not each.selected and each.handler.family.replaced}
    on_disk = {name: key for key, name in names_in_model(model, stored).items()}
    tied = {name for name in kept if f"{name}.weight" not in on_disk}
    return sorted((matrices | tied) - in_fp8)


def _aliases(model: Any, stored: Mapping[str, Stored]) -> dict[str, str]:
    """What transformers calls the modules of tensors once it has loaded them, where that is another name."""
    names = names_in_model(model, stored)
    return {key.rpartition(".")[0]: name.rpartition(".")[0] for key, name in names.items() if key != name}


def _is_matrix(key: str, each: Stored) -> bool:
    return key.endswith(".weight") and len(each.shape) == 2 and each.dtype is not None and not is_fp8(each.dtype)
