"""`save_pretrained` of a converted model: files are written aside, and put into the folder when all are there.

transformers writes into the folder file by file, so that a process which ends meanwhile, or a full disk, leaves a
checkpoint of new and old files. Here they are in a hidden folder inside until they are complete. What remains is a
moment in which names change. One file of weights is replaced in one step, where the configuration stays the same; else
the old files are in another hidden folder until everything is in place, and without them the folder does not load.
"""

from __future__ import annotations

import filecmp
import os
import re
import shutil
import tempfile
from contextvars import ContextVar
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch

from ..checkpoint.whole_folder import explained
from ..lifecycle import Phase, state_of
from ..modules.handler import Change

_STAGE, _ASIDE = ".fp8-saving-", ".fp8-replaced-"
_SUFFIX, _CONFIG = ".safetensors", "config.json"
_SHARD = re.compile(r"(.+)-\d{5}-of-\d{5}\.safetensors$")


@dataclass
class _Save:
    """A call of `save_pretrained` that is under way.

    Attributes:
        stage: the folder that transformers writes to.
        target: the folder that the caller named.
        times: when the files there were changed last, by name.
    """

    stage: str
    target: str
    times: dict[str, float]


_under_way: ContextVar[_Save | None] = ContextVar("save_under_way", default=None)


class _Guard(Change):
    """A method in an instance's place; undone, the class has its own again."""

    def undo(self) -> None:
        self.owner.__dict__.pop(self.attribute, None)


def guard_saving(model: Any) -> list[Change]:
    """Have `model` save by way of a hidden folder, and push a model card that says what it is.

    Returns:
        what was changed.
    """
    changes: list[Change] = []
    for function in (save_pretrained, _upload_modified_files):  # pickles find methods by the names of their functions
        name = function.__name__
        if name not in model.__dict__ and hasattr(type(model), name):
            model.__dict__[name] = MethodType(function, model)
            changes.append(_Guard(model, name, None))
    return changes


def save_pretrained(model: Any, save_directory: str | os.PathLike[str], *args: Any, **options: Any) -> Any:
    """What the class does, in a folder aside where this process alone writes all of a model in FP8.

    Raises:
        FP8CheckpointError: the disk is full, or nothing may be written to the folder, which is as it was.
    """
    original = type(model).save_pretrained
    if not _alone(model, args, options) or os.path.isfile(save_directory):
        return original(model, save_directory, *args, **options)
    target = os.path.abspath(save_directory)
    if args[2] if len(args) > 2 else options.get("push_to_hub"):
        options.setdefault("repo_id", os.path.basename(target))  # as the class, of the folder that it writes to
    with explained(target, "it is as it was"):
        created = not os.path.isdir(target)
        os.makedirs(target, exist_ok=True)
        _remove_stages(target)
        stage = tempfile.mkdtemp(dir=target, prefix=_STAGE)
        token = _under_way.set(_Save(stage, target, _times(target)))
        try:
            result = original(model, stage, *args, **options)
            if os.path.isdir(stage):
                _put_into(stage, target)
            return result
        finally:
            _under_way.reset(token)
            shutil.rmtree(stage, ignore_errors=True)
            if created and not os.listdir(target):
                os.rmdir(target)


def _upload_modified_files(
    model: Any, working_dir: str | os.PathLike[str], repo_id: str, *args: Any, **options: Any
) -> Any:
    """What the class does, with a model card of the FP8 model where there was none, and after files are in place."""
    from .model_card import README, fp8_card_for  # with the report, which loading needs nothing of

    under_way, folder = _under_way.get(), os.fspath(working_dir)
    readme = os.path.join(folder, README)
    if under_way is not None and under_way.stage == folder:
        folder, own = under_way.target, os.path.join(under_way.target, README)
        if os.path.isfile(own):  # the user's
            os.remove(readme)
            under_way.times.pop(README, None)
        else:
            fp8_card_for(model, readme, repo_id)
        _put_into(under_way.stage, folder)
        options["files_timestamps"] = under_way.times
        args = args[1:]
    else:
        fp8_card_for(model, readme, repo_id)
    return type(model)._upload_modified_files(model, folder, repo_id, *args, **options)


def _alone(model: Any, args: tuple[Any, ...], options: dict[str, Any]) -> bool:
    """Whether this call writes everything, and it is a converted model that is written."""
    state, main = state_of(model), args[0] if args else options.get("is_main_process", True)
    spread = torch.distributed.is_available() and torch.distributed.is_initialized()
    others = spread and torch.distributed.get_world_size() > 1
    adapters = getattr(model, "_hf_peft_config_loaded", False)
    converted = state is not None and state.phase is Phase.CONVERTED
    return bool(converted and main and not others and not adapters and not options.get("distributed_checkpoint"))


def _put_into(stage: str, target: str) -> None:
    """Move what was saved into the folder, so that at no moment new files and old ones load together."""
    names = sorted(os.listdir(stage))
    weights = [name for name in names if name.endswith(_SUFFIX)]
    indexes = [name for name in names if name.endswith(f"{_SUFFIX}.index.json")]
    old, last = _heads(target, weights), indexes or weights
    if old != last or indexes or not _same(stage, target, _CONFIG):
        _take_aside(target, old, _shards_beside(target, weights), names)
    for name in [*(name for name in names if name not in last), *last]:
        _move(os.path.join(stage, name), os.path.join(target, name))
    for name in os.listdir(target):
        if name.startswith(_ASIDE):
            shutil.rmtree(os.path.join(target, name), ignore_errors=True)
    os.rmdir(stage)


def _take_aside(target: str, heads: list[str], shards: list[str], names: list[str]) -> None:
    """Put the files of a checkpoint into a hidden folder: weights are moved, and others copied, since they are small.

    The first that are moved are those without which the checkpoint does not load.
    """
    moved = [*heads, *sorted({*shards} - {*heads})]
    copied = [name for name in names if name not in moved and os.path.isfile(os.path.join(target, name))]
    aside = tempfile.mkdtemp(dir=target, prefix=_ASIDE)
    for name in copied:
        shutil.copy2(os.path.join(target, name), os.path.join(aside, name))
    for name in moved:
        os.replace(os.path.join(target, name), os.path.join(aside, name))


def _shards_beside(target: str, weights: list[str]) -> list[str]:
    """The files in a folder that are parts of the weights that are about to be replaced."""
    stems = {_stem(name) for name in weights}
    found = ((name, _SHARD.match(name)) for name in os.listdir(target))
    return [name for name, match in found if match and match[1] in stems]


def _same(one: str, other: str, name: str) -> bool:
    """Whether a file of that name is the same in two folders."""
    first, second = os.path.join(one, name), os.path.join(other, name)
    return os.path.isfile(first) and os.path.isfile(second) and filecmp.cmp(first, second, shallow=False)


def _move(source: str, target: str) -> None:
    if os.path.isdir(source) and os.path.isdir(target):
        shutil.rmtree(target)
    os.replace(source, target)


def _stem(name: str) -> str:
    """ "model" of the name of a file of weights, or of one of their shards."""
    match = _SHARD.match(name)
    return match[1] if match else name.removesuffix(_SUFFIX)


def _heads(target: str, weights: list[str]) -> list[str]:
    """The files in a folder by which the weights are found that are about to be replaced."""
    stems = {_stem(name) for name in weights}
    found = [f"{stem}{ending}" for stem in stems for ending in (f"{_SUFFIX}.index.json", _SUFFIX)]
    return [name for name in found if os.path.isfile(os.path.join(target, name))]


def _remove_stages(target: str) -> None:
    """Remove what saves have left that were broken off."""
    for name in os.listdir(target):
        if name.startswith(_STAGE):
            shutil.rmtree(os.path.join(target, name), ignore_errors=True)


def _times(folder: str) -> dict[str, float]:
    return {name: os.path.getmtime(os.path.join(folder, name)) for name in os.listdir(folder)}
