"""save and load: models that are no transformers models, in a folder of safetensors and a configuration.

Models of diffusers go into the folder by their own `save_pretrained`, and are made from what it wrote.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence

import transformers
from huggingface_hub import save_torch_state_dict
from torch import nn

from ..errors import FP8CheckpointError, FP8StateError
from ..lifecycle import expect_folded, refuse_no_module, refuse_second_time, unfolded_on_error
from ..measure import architecture, difference
from ..modules import part_of
from ..selection import is_of_diffusers
from .diffusers_models import attach_to_diffusers, in_saved_dtypes, made_from_config
from .fill import fill
from .folder import CONFIG_FILE, DIFFUSERS, Layout, layout_of, read, read_config, weight_files
from .format import checkpoint_of
from .native import Native, saved_decisions
from .targets import target_to_load
from .whole_folder import whole_folder
from .whole_state import tensors_to_write


def save(model: nn.Module, folder: str | os.PathLike[str], *, max_shard_size: int | str = "5GB") -> None:
    """Write a converted model into a folder, as the public `save` tells, without verifying what was written.

    Raises:
        FP8StateError: the model is not converted, or only parts of it are.
        FP8CheckpointError: the folder holds something, or a scale is not sound.
        FP8NotAvailableError: weights are offloaded, or there is state that is no tensor.
    """
    refuse_no_module(model, "save")
    checkpoint, native = checkpoint_of(model), Native()
    if checkpoint.config is None:
        raise FP8StateError(
            "save: only parts of this model were converted, each by itself: save those parts, or convert the model as "
            "a whole, with an allowlist"
        )
    with whole_folder(folder, replace_empty=True) as temporary:
        if isinstance(model, transformers.PreTrainedModel) or is_of_diffusers(model):
            model.save_pretrained(temporary, max_shard_size=max_shard_size)  # type: ignore[operator]
            return
        native.refuse(checkpoint)
        said = native.config(checkpoint)
        tensors, metadata = tensors_to_write(model, checkpoint, said)
        save_torch_state_dict(tensors, temporary, max_shard_size=max_shard_size, metadata=metadata)
        with open(os.path.join(temporary, CONFIG_FILE), "w", encoding="utf-8") as file:
            json.dump(said, file, indent=2)


def load(
    folder: str | os.PathLike[str], model: nn.Module | type[nn.Module] | None = None, *, target: str | None = None
) -> nn.Module:
    """Make `model` the FP8 model that `save` wrote: it is converted without data, and takes all of the saved state.

    An error leaves the model as it was.

    Args:
        folder: what `save` wrote, or `save_pretrained` of a converted model of diffusers.
        model: the same architecture in high precision, on any device; on meta, what is read stays on the CPU. A model
            of diffusers is made from the folder where it is left out; one of a class that diffusers does not have, if
            that class is given.
        target: "gaudi2", "gaudi3", "cuda" or "cpu"; None: the one it was saved for, or on a Gaudi that cannot compute
            as that one, the Gaudi.

    Returns:
        `model` itself, or the model that was made.

    Raises:
        FP8CheckpointError: nothing of `save` is there, it is damaged or edited, or `model` is another architecture.
        FP8StateError: the model is prepared or converted already, is a transformers model, or is needed and missing.
        FP8ConfigError: an unknown target.
        FP8NotAvailableError: the folder is of diffusers, which is not installed.
    """
    folder, layout = os.fspath(folder), layout_of(os.fspath(folder))
    made = model is None or isinstance(model, type)
    if not isinstance(model, type | None):
        _refuse_other(folder, model)
    config, files = read_config(folder, layout), weight_files(folder, layout)
    if isinstance(model, type | None):
        model = _made(folder, layout, model)
    made_for = config.resolved_target
    config = config.replace(target=target_to_load(made_for, target))
    told, tensors = read(folder, layout, files)
    with unfolded_on_error(expect_folded(model, config, tensors)):
        if unlike := difference(told.get("architecture", {}), architecture(model)):
            raise FP8CheckpointError(f"{folder} is of another architecture: {unlike}; give the one that was saved")
        _check_part(folder, told.get("part"), part_of(model))
        decisions = saved_decisions(model, config, files, {})
        state = fill(model, config, decisions, tensors, made_for=made_for, where=folder, files=files, told=told)
    if made:
        in_saved_dtypes(model, told.get("dtypes", {}))
    if is_of_diffusers(model):
        attach_to_diffusers(model, state)
    return model


def _made(folder: str, layout: Layout, cls: type[nn.Module] | None) -> nn.Module:
    """The model that a folder is of, without weights."""
    if layout is not DIFFUSERS:
        raise FP8StateError(
            f"load: {folder} does not say how its model is made: pass it, load({folder!r}, model), of the same "
            "architecture as the one that was saved"
        )
    return made_from_config(folder, cls)


def _refuse_other(folder: str, model: nn.Module) -> None:
    """Refuse a model that cannot be made what `save` wrote."""
    refuse_second_time(model, "load")
    if isinstance(model, transformers.PreTrainedModel):
        kind = type(model).__name__
        raise FP8StateError(f"load: {kind} is a transformers model: use {kind}.from_pretrained({folder!r})")


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
