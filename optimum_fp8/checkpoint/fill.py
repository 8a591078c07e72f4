"""Filling a model with the tensors of a checkpoint: it is in FP8 afterwards, or as it was."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..config import FP8Config
from ..errors import FP8CheckpointError
from ..formats import is_fp8, not_finite
from ..lifecycle import FP8State, Phase, set_state
from ..measure import Measurements
from ..modules import FP8Module, frozen, swap
from ..modules.handler import Target, pack_all
from ..selection import Decision
from .folder import Tensors
from .intact import check_intact, check_saved
from .native import check_scales, saved_scales
from .provenance import recorded_provenance
from .ranges import converted_targets, recorded_ranges
from .targets import fit_to_target
from .whole_state import buffers_of, state_tensors


def fill(
    model: nn.Module,
    config: FP8Config,
    decisions: Sequence[Decision],
    tensors: Tensors,
    *,
    made_for: str,
    where: str,
    files: Sequence[str] = (),
    told: Mapping[str, Any] | None = None,
) -> FP8State:
    """Convert `model` without data, and give it all of the state that was read; an error leaves it as it was.

    Args:
        model: in high precision.
        config: of the checkpoint, with the target that it is loaded for.
        decisions: about the model's modules.
        tensors: by name, codes `[1, out, in, …]`.
        made_for: the target that the checkpoint was made for.
        where: the tensors come from, for messages.
        files: of a checkpoint of ours, which have to agree with the configuration.
        told: the record in them.

    Raises:
        FP8CheckpointError: the tensors are not those of the model, or damaged.
    """
    told = told or {}
    with _made_ready(model, decisions, files):
        if files:
            check_intact(model, decisions, config, made_for, files, told)
        own, buffers = state_tensors(model), buffers_of(model)
        _check_same(where, tensors, own | {name: buffers[name] for name in told.get("buffers", ()) if name in buffers})
        _assign(model, tensors)
        check_scales(model, "loaded")
        check_saved(files, told)
        measured = Measurements("", recorded_ranges(told, decisions, ""), observer=config.observer)
        state = FP8State(config, list(decisions), Phase.CONVERTED, measured)
        state.provenance = recorded_provenance(told, made_for, config.resolved_target)
        fit_to_target(converted_targets(model, state), made_for)
        targets = state.targets(model)
        for each in targets:
            each.handler.loaded(each)
        state.change_around(model, targets)
    pack_all(model)
    set_state(model, state)
    return state


def _check_same(folder: str, tensors: Tensors, expected: Tensors) -> None:
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


def _assign(model: nn.Module, tensors: Tensors) -> None:
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
    for name in buffers_of(model).keys() & rest.keys():
        owner, _, leaf = name.rpartition(".")
        model.get_submodule(owner)._buffers[leaf] = rest[name]


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
