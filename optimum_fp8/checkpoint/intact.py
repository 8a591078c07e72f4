"""Whether a checkpoint of ours is as it was saved: its tensors and its configuration must fit each other.

Names, shapes and dtypes of scales, which stand in the headers of the files, tell most of it. The rest is told by a
record in the metadata of each file: the keys that say how the model computes, and which scales attention has.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from ..attention import CHILD
from ..config import FORMAT_VERSION, KEYS, FP8Config
from ..errors import FP8CheckpointError
from ..modules import fp8_modules
from ..modules.handler import converted_modules, find_all
from ..selection import Decision, names_in_checkpoint
from .digests import RECORD, SAVE, check_digests, is_whole, signed
from .model_config import CONFIG, MODEL, changed_keys, config_to_record
from .names import name_of, names_in_model
from .native import SCALE, name_in, refuse_damaged
from .ranges import Known, known_ranges

logger = logging.getLogger(__name__)

_OF_MODULES = [name for name, key in KEYS.items() if key.of_module]
_OF_THIS_MODEL = ("overrides", "modules_to_not_convert")
_SELECTING = ("allowlist", "blocklist", "quantize_lm_head", "quantize_routers", "fold_batch_norm")
_TOLD = (*_OF_MODULES, *_OF_THIS_MODEL, *_SELECTING, "target", "model_class", "format_version")
_FLOAT32 = "F32"
_EDITED = "the checkpoint was edited or mixed from others: save it again"

Header = tuple[str, tuple[int, ...]]


def record(model: nn.Module, config: FP8Config, ranges: Known | None = None, **more: Any) -> str:
    """What the files of a checkpoint say of the model and the configuration it is saved with, and `more`.

    Args:
        model: converted.
        config: as it is saved.
        ranges: that its scales follow from; None: what is known of the model.
        more: JSON.
    """
    configuration = config.to_dict()
    converted = converted_modules(model)
    scales = {
        name_of(name): sorted(handler.state(module))
        for name, (module, handler) in converted.items()
        if not handler.family.replaced
    }
    modules = [name_of(name) for name, (_, handler) in converted.items() if handler.family.replaced]
    of_model: dict[str, Any] = {"format_version": config.format_version, "config": configuration}
    of_model |= {"scales": scales, "modules": modules}
    if model_config := config_to_record(model):
        of_model[MODEL] = model_config
    known = known_ranges(model) if ranges is None else ranges
    said = {**of_model, **({"ranges": known} if known else {}), **more}
    return signed(said) if SAVE in said else json.dumps(said)


def recorded(files: Sequence[str] | None) -> dict[str, Any]:
    """The record in the files of a checkpoint: the first that lists modules; empty where there is none."""
    for path in files or ():
        if str(path).endswith(".safetensors"):
            with refuse_damaged(path), safe_open(path, framework="pt") as file:
                said = read_record(path, file.metadata())
            if "modules" in said:
                return said
    return {}


def check_intact(
    model: nn.Module,
    decisions: Sequence[Decision],
    config: FP8Config,
    made_for: str,
    files: Sequence[str] | None,
    told: Mapping[str, Any] | None = None,
) -> None:
    """Refuse a checkpoint whose tensors do not fit its configuration; older ones have no record, and less is told.

    Args:
        model: with room for the tensors of the checkpoint, whose data is not needed yet.
        decisions: about its modules.
        config: of the checkpoint, with `target` perhaps replaced.
        made_for: the target it says it was made for.
        files: of the checkpoint; those that are no safetensors tell nothing.
        told: the record, where the files do not hold it.

    Raises:
        FP8CheckpointError: names the tensor or the key.
    """
    headers: dict[str, Header] = {}
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    for path in files or ():
        if str(path).endswith(".safetensors"):
            said, more = _read(path)
            headers |= more
            known = said or told or {}
            _check_config(path, known, config, made_for)
            _check_record_of_scales(path, known.get("scales", {}), model, decisions, prefix)
            if known.get("by_name"):
                _refuse_transposed(path, model)
    _check_scales(headers, model, decisions, prefix, config.modules_to_not_convert or [])


def check_saved(
    files: Sequence[str] | None, told: Mapping[str, Any] | None = None, model: nn.Module | None = None
) -> None:
    """Refuse files that do not hold what was saved together, byte for byte: they are read once, as fast as they come.

    Args:
        files: of a checkpoint; those that are no safetensors tell nothing.
        told: the record, where the files do not hold it.
        model: of transformers, made from the `config.json` beside them.

    Raises:
        FP8CheckpointError: names the tensor or the file; or the keys of `config.json` by which the tensors do not fit.
    """
    read = {str(path): _read(path) for path in files or () if str(path).endswith(".safetensors")}
    records = {path: record for path, (record, _) in read.items()}
    check_digests(list(read), records, told)
    for path, record in list(records.items())[:1]:
        place = os.path.join(os.path.dirname(path), CONFIG)
        changed = changed_keys(_said(place), record.get(MODEL, {}))
        keys = ", ".join(f"{key}={found!r}, saved was {saved!r}" for key, (found, saved) in changed.items())
        if changed and model is not None:
            _check_shapes(model, {key: header for _, headers in read.values() for key, header in headers.items()}, keys)
        if changed:
            logger.warning("%s was edited (%s): the model may compute something else", place, keys)


def _check_shapes(model: nn.Module, headers: Mapping[str, Header], edited: str) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for key, name in names_in_model(model, headers).items():
        expected, (_, found) = shapes.get(name), headers[key]
        if expected is not None and found not in (expected, (1, *expected)):
            raise FP8CheckpointError(
                f"{key} has shape {found} in the checkpoint, but the model expects {expected}: config.json was edited "
                f"({edited}); put it back"
            )


def _said(path: str) -> dict[str, Any]:
    """What `config.json` says; what is no JSON, transformers has refused before."""
    try:
        with open(path, encoding="utf-8") as file:
            return dict(json.load(file))
    except (OSError, ValueError, TypeError):
        return {}


def read_record(path: str, metadata: Mapping[str, str] | None) -> dict[str, Any]:
    """The record in the metadata of a file; empty where there is none.

    Raises:
        FP8CheckpointError: it is damaged, or of a newer format.
    """
    try:
        said: dict[str, Any] = json.loads((metadata or {}).get(RECORD, "{}"))
        newer = said.get("format_version", 0) > FORMAT_VERSION
    except (ValueError, AttributeError, TypeError) as error:
        raise FP8CheckpointError(f"the metadata {RECORD!r} of {path} cannot be read ({error}): {_EDITED}") from None
    if newer:
        raise FP8CheckpointError(f"{path} was written by a newer optimum_fp8: upgrade optimum_fp8")
    if not is_whole(said):
        raise FP8CheckpointError(f"the metadata {RECORD!r} of {path} is not what was written: {_EDITED}")
    return said


def _read(path: str) -> tuple[dict[str, Any], dict[str, Header]]:
    """The record of a file, and the dtype and shape of its tensors by name."""
    with refuse_damaged(path), safe_open(path, framework="pt") as file:
        said = read_record(path, file.metadata())
        slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
        headers = {key: (part.get_dtype(), tuple(part.get_shape())) for key, part in slices.items()}
    return said, headers


def _check_config(path: str, said: Mapping[str, Any], config: FP8Config, made_for: str) -> None:
    found = json.loads(json.dumps({**config.to_dict(), "target": made_for}))
    record: Mapping[str, Any] = said.get("config", {})
    # A part of a model, loaded from the checkpoint of the whole, has a configuration of its own.
    others = record.get("model_class", config.model_class) != config.model_class
    for key, made_with in record.items():
        if key not in _TOLD or key == "scale_format" or (others and key in (*_OF_THIS_MODEL, "model_class")):
            continue  # what changes no result may be chosen when loading
        if key in found and found[key] != made_with:
            hint = "; pass FP8Config(target=…) when loading to change it" if key == "target" else ""
            raise FP8CheckpointError(
                f"{path} was made with {key}={made_with!r}, but the configuration of the checkpoint says "
                f"{found[key]!r}: put it back, or quantize the original model again{hint}"
            )


def _check_record_of_scales(
    path: str, said: Mapping[str, list[str]], model: nn.Module, decisions: Sequence[Decision], prefix: str
) -> None:
    converted = converted_modules(model)
    for each in decisions:
        name = next((name for name in names_in_checkpoint(each.name, prefix) if name in said), None)
        if name is None or each.name not in converted:
            continue
        module, handler = converted[each.name]
        if differing := set(said[name]).symmetric_difference(handler.state(module)):
            raise FP8CheckpointError(
                f"{path} was made with {', '.join(said[name])} of {name}, but {', '.join(sorted(differing))} is "
                f"missing or new: {_EDITED}"
            )


def _refuse_transposed(path: str, model: nn.Module) -> None:
    """Refuse layers whose weight was taken for the `[out, in]` of a `Linear`, by its name, and is stored otherwise."""
    for name, module in fp8_modules(model).items():
        if module.stores_in_out:
            raise FP8CheckpointError(
                f"{path} was quantized without the class of the model, and {name} was taken for a Linear, but it is a "
                f"{type(module.origin).__name__}, whose weight is stored transposed: quantize the original with its "
                "class, or list it in modules_to_not_convert"
            )


def _check_scales(
    headers: Mapping[str, Header],
    model: nn.Module,
    decisions: Sequence[Decision],
    prefix: str,
    left_out: Sequence[str],
) -> None:
    saved: dict[str, dict[str, str]] = {}
    in_model = names_in_model(model, headers)
    for key, full_name in in_model.items():
        if match := SCALE.match(full_name):
            saved.setdefault(match[1], {})[match[2]] = key
        elif f".{CHILD}." in key:
            raise FP8CheckpointError(f"{key} is no scale that attention has: {_EDITED}")
    converted, owned = converted_modules(model), set()
    for each in decisions:
        if each.name not in converted:
            continue
        module, handler = converted[each.name]
        for part, expected in _expected_scales(handler.state(module)).items():
            names = [f"{name}.{part}" if part else name for name in names_in_checkpoint(each.name, prefix)]
            if (name := name_in(names, saved)) is None:
                continue
            owned.add(name)
            for scale, key in saved[name].items():
                _check_scale(key, headers[key], expected.get(scale), each)
    rest = {name: scales for name, scales in saved.items() if name not in owned}
    _refuse_foreign(set(in_model.values()), rest, model, prefix, left_out)


def _expected_scales(state: Mapping[str, torch.Tensor]) -> dict[str, dict[str, tuple[int, ...]]]:
    """The shapes of a module's scales by name, those of each part of it that has weights of its own; "" is itself."""
    expected: dict[str, dict[str, tuple[int, ...]]] = {"": {}}
    for key, tensor in state.items():
        part, _, name = key.rpartition(".")
        if name.endswith("_scale"):
            expected.setdefault("" if part == CHILD else part, {})[name] = tuple(tensor.shape)
    return expected


def _check_scale(key: str, header: Header, expected: tuple[int, ...] | None, decision: Decision) -> None:
    dtype, shape = header
    if expected is None:
        raise FP8CheckpointError(
            f"{key} is in the checkpoint, but its configuration has no such scale for {decision.name} "
            f"({decision.scheme}): {_EDITED}"
        )
    if dtype != _FLOAT32:
        raise FP8CheckpointError(f"{key} is {dtype} in the checkpoint, expected {_FLOAT32}: {_EDITED}")
    if shape != expected:
        raise FP8CheckpointError(
            f"{key} has shape {shape} in the checkpoint, expected {expected} ({decision.scheme}): {_EDITED}"
        )


def _refuse_foreign(
    in_model: Collection[str],
    rest: Mapping[str, Mapping[str, str]],
    model: nn.Module,
    prefix: str,
    left_out: Sequence[str],
) -> None:
    """Refuse scales of modules that the configuration leaves in high precision, and scales without codes."""
    for module_name, (module, handler) in find_all(model).items():
        names = names_in_checkpoint(module_name, prefix)
        name = next((name for name in names if name in rest), None)
        if name is None or (handler.family.replaced and not set(left_out).intersection(names)):
            continue
        if not any(hasattr(module, scale) for scale in rest[name]):
            key = next(iter(rest[name].values()))
            raise FP8CheckpointError(
                f"{key} is in the checkpoint, but its configuration leaves {module_name} in high precision: {_EDITED}"
            )
    for name, scales in rest.items():
        if "weight_scale" in scales and f"{name}.weight" not in in_model:
            raise FP8CheckpointError(f"{scales['weight_scale']} is the scale of no weight in the checkpoint: {_EDITED}")
