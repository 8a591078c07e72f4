"""Where the weights that an adapter changes lie: in an FP8 checkpoint, and in the model that it was made of."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..checkpoint.folder import config_of_transformers
from ..checkpoint.intact import check_saved
from ..checkpoint.names import names_in_model
from ..config import FP8Config
from ..errors import FP8CheckpointError, FP8NotAvailableError, nearest
from ..files.skeleton import class_saved, in_files, untied_keys
from ..files.source import Stored, open_source, tensors_in
from ..formats import is_fp8
from ..hf.ties import tied_modules
from ..modules import FP8Module, fp8_modules
from ..modules.linear import FP8LinearBase
from .lora import LoraWeights

_ONE_BY_ONE = (
    "only weights of linear layers that lie in the checkpoint one by one are merged here: merge the adapter with peft "
    "into the model in high precision (merge_and_unload), save that, and quantize what was saved"
)
_NEAREST = 5  # so many names are shown where one is wrong


@dataclass(frozen=True)
class Place:
    """A weight that an adapter changes.

    Attributes:
        name: of its module in the model.
        weights: what the adapter has for it.
        module: in FP8, without values; None where the layer stays in high precision.
        in_out: whether the original keeps it as `[in, out]`.
        parts: where it lies, by `weight` and `weight_scale`.
        original: where the original's weight lies, or None.
    """

    name: str
    weights: LoraWeights
    module: FP8Module | None
    in_out: bool
    parts: dict[str, Stored]
    original: Stored | None

    def out_in(self, weight: torch.Tensor) -> torch.Tensor:
        """The original's weight as `[out, in]`, and the other way round."""
        return weight.t() if self.in_out else weight


@dataclass(frozen=True)
class Places:
    """An FP8 checkpoint, and what an adapter changes in it.

    Attributes:
        folder: where it is.
        files: paths of its files with weights.
        stored: where each of its tensors lies, by its name on disk.
        model: that it is of, without values.
        config: that it was saved with.
        original: the folder of the original, or None.
        changed: the weights that change.
    """

    folder: str
    files: list[str]
    stored: dict[str, Stored]
    model: Any
    config: FP8Config
    original: str | None
    changed: list[Place]


def places_of(
    folder: str | os.PathLike[str],
    weights: Mapping[str, LoraWeights],
    original: str | os.PathLike[str] | None,
) -> Places:
    """Find the weights that an adapter changes in the checkpoint `folder`, and in the original if it is given.

    Raises:
        FP8CheckpointError: no FP8 checkpoint, an adapter of another model, or an original of another model.
        FP8NotAvailableError: a layer whose weight cannot be merged by itself.
    """
    folder = os.path.abspath(folder)
    config = config_of_transformers(folder)
    files, stored = tensors_in(folder)
    check_saved(files)  # nothing of it is read where the model is made without values
    model = class_saved(folder, config).from_pretrained(folder, device_map="meta")
    here = in_files(model, stored)
    there: dict[str, Stored] = {}
    if original is not None:
        source = open_source(os.fspath(original))
        there = {name: source.tensors[key] for name, key in in_files(model, source.tensors).items()}
        there = untied_keys(model, there)
    changed = [_place(model, each, {name: stored[key] for name, key in here.items()}) for each in weights.values()]
    if original is not None:
        changed = [_with_original(each, there, os.fspath(original)) for each in changed]
    carried = model.config.quantization_config
    return Places(folder, files, stored, model, carried, None if original is None else os.fspath(original), changed)


def _place(model: Any, weights: LoraWeights, here: Mapping[str, Stored]) -> Place:
    name = _name(model, weights)
    module, in_fp8 = model.get_submodule(name), fp8_modules(model).get(name)
    plain = isinstance(module, (nn.Linear, Conv1D))
    if not (isinstance(in_fp8, FP8LinearBase) and not in_fp8.derived) and not plain:
        raise FP8NotAvailableError(f"{name} of {type(model).__name__} is a {_kind(module)}: {_ONE_BY_ONE}")
    parts = {part: here[f"{name}.{part}"] for part in ("weight", "weight_scale") if f"{name}.{part}" in here}
    if "weight" not in parts:
        tied = name in tied_modules(model)
        why = "is tied to another weight, which would change with it" if tied else "is put together while loading"
        raise FP8NotAvailableError(f"the weight of {name} {why}: {_ONE_BY_ONE}")
    if in_fp8 is None and name in tied_modules(model):
        raise FP8NotAvailableError(f"the weight of {name} is tied to another one, which would change: {_ONE_BY_ONE}")
    stored = parts["weight"]
    if (in_fp8 is not None) != (stored.dtype is not None and is_fp8(stored.dtype)):
        raise FP8CheckpointError(f"{stored} is {stored.dtype}, which does not fit its configuration: save it again")
    in_out = bool(getattr(in_fp8, "stores_in_out", False)) or isinstance(module, Conv1D)
    shape = stored.shape[1:] if in_fp8 is not None else stored.shape[:: -1 if in_out else 1]
    if tuple(shape) != weights.shape:
        raise FP8CheckpointError(
            f"the adapter's B A for {weights.name} is {weights.shape}, but the weight of {name} is {tuple(shape)}: the "
            "adapter is of another model"
        )
    return Place(name, weights, in_fp8, in_out, parts, None)


def _name(model: Any, weights: LoraWeights) -> str:
    """The name in the model of a module that an adapter names, as it was or as transformers has renamed it."""
    names = {name for name, _ in model.named_modules()}
    renamed = names_in_model(model, [f"{weights.name}.weight"])[f"{weights.name}.weight"].removesuffix(".weight")
    found = next((name for name in (weights.name, renamed) if name in names), None)
    if found is None:
        with_weights = (name for name, module in model.named_modules() if hasattr(module, "weight"))
        raise FP8CheckpointError(
            f"the adapter changes {weights.name}, which {type(model).__name__} does not have: "
            f"{nearest(weights.name, with_weights, closest=_NEAREST)}; it is of another model"
        )
    return found


def _kind(module: nn.Module) -> str:
    return type(getattr(module, "origin", module)).__name__


def _with_original(place: Place, there: Mapping[str, Stored], original: str) -> Place:
    if place.module is None:
        return place
    stored = there.get(f"{place.name}.weight")
    expected = place.weights.shape[::-1] if place.in_out else place.weights.shape
    if stored is None or stored.shape != expected:
        found = "nothing" if stored is None else f"{stored} of shape {stored.shape}"
        raise FP8CheckpointError(
            f"{original} holds {found} for {place.name}.weight, expected {expected}: give the model that the "
            "checkpoint was quantized from"
        )
    return replace(place, original=stored)
