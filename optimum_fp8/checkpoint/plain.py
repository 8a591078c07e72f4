"""save and load: models that are no transformers models, in a folder of safetensors and a configuration."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from huggingface_hub import save_torch_state_dict
from safetensors import safe_open
from torch import nn

from ..config import QUANT_METHOD, FP8Config
from ..errors import FP8CheckpointError, FP8NotAvailableError, FP8StateError
from ..formats import is_fp8, not_finite
from ..lifecycle import FP8State, Phase, refuse_second_time, set_state
from ..measure import Measurements, architecture, difference
from ..modules import FP8Module, frozen, part_of, swap
from ..modules.handler import Target, pack_all
from ..selection import Decision
from .format import checkpoint_of, whole_folder
from .inc import refuse_incs
from .intact import RECORD, check_intact, read_record, record
from .native import Native, check_scales, refuse_damaged, saved_decisions, saved_scales
from .ranges import converted_targets, recorded_ranges
from .targets import fit_to_target, target_to_load

CONFIG_FILE = "quantization.json"
_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_Tensors = dict[str, torch.Tensor]


def save(model: nn.Module, folder: str | os.PathLike[str], *, max_shard_size: int | str = "5GB") -> None:
    """Write a converted model: `model.safetensors` with all of its state, and `quantization.json`.

    The folder is made beside its place and moved there, so it is whole or not there. `load` reads it. A transformers
    model is written by its own `save_pretrained`, and read by `from_pretrained`.

    Args:
        model: what `convert` returned.
        folder: where to; one that holds anything is refused.
        max_shard_size: of one file of weights, as `save_pretrained` takes it.

    Raises:
        FP8StateError: the model is not converted, or only parts of it are.
        FP8CheckpointError: the folder holds something, or a scale is not sound.
        FP8NotAvailableError: weights are offloaded, or there is state that is no tensor.
    """
    checkpoint, native = checkpoint_of(model), Native()
    if checkpoint.config is None:
        raise FP8StateError(
            "save: only parts of this model were converted, each by itself: save those parts, or convert the model as "
            "a whole, with an allowlist"
        )
    with whole_folder(folder, replace_empty=True) as temporary:
        if isinstance(model, transformers.PreTrainedModel):
            model.save_pretrained(temporary)
            return
        native.refuse(checkpoint)
        said = native.config(checkpoint)
        tensors, shared = _apart(_state(model) | native.tensors(checkpoint))
        more: dict[str, Any] = {"architecture": architecture(model), "shared": shared, "part": part_of(model)}
        told = record(model, FP8Config.from_dict(said), **more)
        save_torch_state_dict(tensors, temporary, max_shard_size=max_shard_size, metadata={RECORD: told})
        with open(os.path.join(temporary, CONFIG_FILE), "w", encoding="utf-8") as file:
            json.dump(said, file, indent=2)


def load(folder: str | os.PathLike[str], model: nn.Module, *, target: str | None = None) -> nn.Module:
    """Make `model` the FP8 model that `save` wrote: it is converted without data, and takes all of the saved state.

    An error leaves the model as it was.

    Args:
        folder: what `save` wrote.
        model: the same architecture in high precision, on any device; on meta, what is read stays on the CPU.
        target: "gaudi2", "gaudi3", "cuda" or "cpu"; None: the one it was saved for, or on a Gaudi that cannot compute
            as that one, the Gaudi.

    Returns:
        `model` itself.

    Raises:
        FP8CheckpointError: nothing of `save` is there, it is damaged or edited, or `model` is another architecture.
        FP8StateError: the model is prepared or converted already, or is a transformers model.
        FP8ConfigError: an unknown target.
    """
    refuse_second_time(model, "load")
    if isinstance(model, transformers.PreTrainedModel):
        kind = type(model).__name__
        raise FP8StateError(f"load: {kind} is a transformers model: use {kind}.from_pretrained({os.fspath(folder)!r})")
    folder = os.fspath(folder)
    config, files = _config(folder), _files(folder)
    made_for = config.resolved_target
    config = config.replace(target=target_to_load(made_for, target))
    told, tensors = _read(folder, files)
    if unlike := difference(told.get("architecture", {}), architecture(model)):
        raise FP8CheckpointError(f"{folder} is of another architecture: {unlike}; give the one that was saved")
    _check_part(folder, told.get("part"), part_of(model))
    decisions = saved_decisions(model, config, files, {})
    with _made_ready(model, decisions, files):
        check_intact(model, decisions, config, made_for, files, told)
        _check_same(folder, tensors, _state(model))
        _assign(model, tensors)
        check_scales(model, "loaded")
        measured = Measurements("", recorded_ranges(told, decisions, ""), observer=config.observer)
        state = FP8State(config, decisions, Phase.CONVERTED, measured)
        fit_to_target(converted_targets(model, state), made_for)
        targets = state.targets(model)
        for each in targets:
            each.handler.loaded(each)
        state.change_around(model, targets)
    pack_all(model)
    set_state(model, state)
    return model


# --- files --------------------------------------------------------------------------------------------------------


def _config(folder: str) -> FP8Config:
    refuse_incs(folder)
    path = os.path.join(folder, CONFIG_FILE)
    if not os.path.isfile(path):
        hint = "it is a transformers checkpoint: use from_pretrained" if _has_config(folder) else "use optimum_fp8.save"
        raise FP8CheckpointError(f"{path} does not exist, expected what optimum_fp8.save wrote; {hint}")
    try:
        with open(path, encoding="utf-8") as file:
            said = json.load(file)
        method = said.get("quant_method")
    except (ValueError, AttributeError) as error:
        raise FP8CheckpointError(f"{path} is not JSON of a configuration ({error}): it is damaged") from None
    if method != QUANT_METHOD:
        raise FP8CheckpointError(f"{path} says quant_method={method!r}, expected {QUANT_METHOD!r}")
    return FP8Config.from_dict(said)


def _has_config(folder: str) -> bool:
    return os.path.isfile(os.path.join(folder, "config.json"))


def _index(folder: str) -> dict[str, Any] | None:
    """The index of weights in several files; None where they are in one."""
    path = os.path.join(folder, _INDEX)
    if not os.path.isfile(path):
        return None
    try:
        with open(path, encoding="utf-8") as file:
            index = json.load(file)
        return {"metadata": dict(index["metadata"]), "weight_map": dict(index["weight_map"])}
    except (ValueError, KeyError, TypeError) as error:
        raise FP8CheckpointError(f"{path} is damaged ({error}): copy it again") from None


def _files(folder: str) -> list[str]:
    index = _index(folder)
    names = [_WEIGHTS] if index is None else sorted(set(index["weight_map"].values()))
    paths = [os.path.join(folder, name) for name in names]
    if absent := [path for path in paths if not os.path.isfile(path)]:
        raise FP8CheckpointError(f"{', '.join(absent)} does not exist: the folder is not whole, copy it again")
    return paths


def _read(folder: str, files: Sequence[str]) -> tuple[dict[str, Any], _Tensors]:
    """What was recorded when the model was saved, and its tensors, those that share memory as one tensor."""
    index, tensors = _index(folder), _Tensors()
    told = {} if index is None else read_record(os.path.join(folder, _INDEX), index["metadata"])
    for path in files:
        with refuse_damaged(path), safe_open(path, framework="pt") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            told = told or read_record(path, file.metadata())
    tensors |= {name: tensors[kept] for name, kept in told.get("shared", {}).items() if kept in tensors}
    return told, tensors


# --- state --------------------------------------------------------------------------------------------------------


def _state(model: nn.Module) -> _Tensors:
    """The state of a model by name.

    Raises:
        FP8NotAvailableError: some of it is no tensor.
    """
    state: dict[str, Any] = dict(model.state_dict())
    for name, value in state.items():
        if not isinstance(value, torch.Tensor):
            raise FP8NotAvailableError(
                f"{name} is of type {type(value).__name__}: only tensors can be saved and loaded"
            )
    return state


def _apart(tensors: Mapping[str, torch.Tensor]) -> tuple[_Tensors, dict[str, str]]:
    """Tensors that share no memory, and for each other name which of them it is.

    Raises:
        FP8NotAvailableError: some are offloaded.
    """
    apart, shared, first, storages = _Tensors(), dict[str, str](), dict[Any, str](), set[int]()
    for name, tensor in tensors.items():
        if tensor.is_meta:
            raise FP8NotAvailableError(f"{name} is offloaded: load the model without offloading, to save it")
        same = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if tensor.numel() and same in first:
            shared[name] = first[same]
            continue
        first[same], memory = name, tensor.untyped_storage()
        whole = tensor.is_contiguous() and tensor.numel() * tensor.itemsize == memory.nbytes()
        alone = whole and memory.data_ptr() not in storages
        apart[name] = tensor.detach() if alone else tensor.detach().clone(memory_format=torch.contiguous_format)
        storages.add(memory.data_ptr())
    return apart, shared


def _check_part(folder: str, saved: Sequence[int] | None, here: Sequence[int] | None) -> None:
    """Refuse what another process saved of a model that is split over them: its tensors have the same shapes."""
    if list(saved or ()) != list(here or ()):
        found, expected = (
            f"rank {part[0]} of {part[1]}" if part else "a process that holds it all" for part in (saved, here)
        )
        raise FP8CheckpointError(
            f"{folder} holds what {found} saved of a model whose layers are split over processes, and this is "
            f"{expected}: give each process what it saved itself, of as many processes"
        )


def _check_same(folder: str, tensors: _Tensors, expected: _Tensors) -> None:
    """Refuse tensors that are not those of the model, one for one."""
    missing, new = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
    if missing or new:
        parts = [f"{text} {', '.join(names[:4])}" for text, names in (("lacks", missing), ("also has", new)) if names]
        raise FP8CheckpointError(
            f"{folder} {' and '.join(parts)}, compared with this model: it is damaged, or of another architecture"
        )
    for name, tensor in tensors.items():
        wanted = expected[name]
        fits = tensor.dtype == wanted.dtype or not (is_fp8(tensor.dtype) or is_fp8(wanted.dtype))
        if tensor.shape != wanted.shape or not fits or tensor.is_floating_point() != wanted.is_floating_point():
            raise FP8CheckpointError(
                f"{name} in {folder} is {tuple(tensor.shape)} in {tensor.dtype}, but the model expects "
                f"{tuple(wanted.shape)} in {wanted.dtype}: it is damaged, or of another architecture"
            )
        if is_fp8(tensor.dtype) and not_finite(tensor):
            raise FP8CheckpointError(f"{name} in {folder} holds codes that are NaN or Inf: it is damaged")


def _assign(model: nn.Module, tensors: _Tensors) -> None:
    """Give a model its state; what shared memory when it was saved shares it again."""
    there = [tensor.device for tensor in model.state_dict().values() if not tensor.is_meta]
    device = there[0] if there else torch.device("cpu")
    own = {name: tensor.device for name, tensor in model.state_dict().items() if not tensor.is_meta}
    placed: dict[int, nn.Parameter] = {}

    def at(name: str, *, codes: bool = False) -> nn.Parameter:
        tensor = tensors[name]
        if id(tensor) not in placed:
            moved = tensor.to(own.get(name, device))
            placed[id(tensor)] = frozen(moved.squeeze(0) if codes else moved)
        return placed[id(tensor)]

    layers = set()
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, FP8Module):
            layers |= {f"{name}.{leaf}" for leaf in ("weight", *module.scale_names)}
            module.set_weight(at(f"{name}.weight", codes=True), at(f"{name}.weight_scale"))
            for leaf in module.scales().keys() - {"weight_scale"}:
                setattr(module, leaf, at(f"{name}.{leaf}"))
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    rest = {name: at(name) if name in parameters else at(name).data for name in tensors if name not in layers}
    model.load_state_dict(rest, strict=False, assign=True)


@contextmanager
def _made_ready(model: nn.Module, decisions: Sequence[Decision], files: Sequence[str]) -> Iterator[None]:
    """Make room for the tensors of a checkpoint; an error inside takes it back."""
    saved, nothing = saved_scales(files), Measurements("")
    replacements: dict[nn.Module, nn.Module] = {}
    kept: list[Target] = []
    before = [(module, dict(module._parameters), dict(module._buffers)) for module in model.modules()]
    try:
        for each in (each for each in decisions if each.selected):
            module = model.get_submodule(each.name)
            target = Target(each.name, module, each.handler, each.scheme, nothing.at(each.name), model)
            made = each.handler.expect(target, saved.get(each.name, {}))
            if made is None:
                kept.append(target)
            else:
                made.managed = False  # type: ignore[assignment]  # nothing but its own state_dict saves it
                replacements[module] = made
        swap(model, replacements)
        yield
    except BaseException:
        swap(model, {new: old for old, new in replacements.items()})
        for target in kept:
            target.handler.restore(target.module)
        for module, parameters, buffers in before:
            module._parameters.update(parameters)
            module._buffers.update(buffers)
        raise
