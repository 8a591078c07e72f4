"""The folder that a model was saved to: which file holds what, by the layout of who saved it."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import safe_open

from ..config import QUANT_METHOD, FP8Config
from ..errors import FP8CheckpointError
from .inc import refuse_incs
from .intact import read_record
from .native import refuse_damaged

CONFIG_FILE = "quantization.json"
_SHARD = re.compile(r"(.+)-\d{5}-of-\d{5}\.safetensors")
OWN_CARD = "<!-- made by optimum_fp8 of this very checkpoint -->"  # in a README.md that `model_card` made
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Layout:
    """Which files a saved model consists of.

    Attributes:
        config_file: holds the configuration of the quantization.
        key: under which it stands there; None: it is all there is in the file.
        weights: the file of all tensors; where they are in several, its index is `weights` and ".index.json".
    """

    config_file: str
    key: str | None
    weights: str

    @property
    def index(self) -> str:
        return f"{self.weights}.index.json"


PLAIN = Layout(CONFIG_FILE, None, "model.safetensors")
DIFFUSERS = Layout("config.json", "quantization_config", "diffusion_pytorch_model.safetensors")


def layout_of(folder: str) -> Layout:
    """How a folder is laid out: what diffusers saves says its class in `config.json`."""
    path = os.path.join(folder, DIFFUSERS.config_file)
    if os.path.isfile(os.path.join(folder, CONFIG_FILE)) or not os.path.isfile(path):
        return PLAIN
    return DIFFUSERS if "_class_name" in read_json(path) else PLAIN


def config_of_transformers(folder: str) -> dict[str, Any]:
    """What `config.json` says in a folder that an FP8 model of transformers was saved to.

    Raises:
        FP8CheckpointError: there is no such checkpoint, it is of another maker, or its index is not there.
    """
    if not os.path.isdir(folder):
        raise FP8CheckpointError(f"{folder} is not a folder: expected one that an FP8 model was saved to")
    refuse_incs(folder)
    path = os.path.join(folder, DIFFUSERS.config_file)
    said = read_json(path) if os.path.isfile(path) else {}
    method = (said.get("quantization_config") or {}).get("quant_method")
    if method == QUANT_METHOD:
        refuse_without_index(folder)
        return said
    advice = "quantize the model with from_pretrained(…, quantization_config=FP8Config(…)) and save_pretrained first"
    if method is not None:
        advice = "load it with optimum_fp8.native_config and save it, if it is an FP8 checkpoint of another maker"
    elif os.path.isfile(os.path.join(folder, CONFIG_FILE)):
        advice = "what optimum_fp8.save wrote is loaded by load(…), and saved again"
    raise FP8CheckpointError(
        f"{folder} holds no FP8 checkpoint of optimum_fp8 of a model of transformers (config.json says "
        f"quant_method={method!r}, expected {QUANT_METHOD!r}): {advice}"
    )


def read_json(path: str) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        FP8CheckpointError: it cannot be read, or holds something else.
    """
    try:
        with open(path, encoding="utf-8") as file:
            said = json.load(file)
    except ValueError as error:
        raise FP8CheckpointError(f"{path} is not JSON of an object ({error}): it is damaged, copy it again") from None
    if not isinstance(said, dict):
        raise FP8CheckpointError(f"{path} is not JSON of an object ({type(said).__name__}): it is damaged")
    return said


def read_config(folder: str, layout: Layout) -> FP8Config:
    """The configuration in a folder.

    Raises:
        FP8CheckpointError: there is none, or not one of ours.
    """
    refuse_incs(folder)
    path = os.path.join(folder, layout.config_file)
    if not os.path.isfile(path):
        raise FP8CheckpointError(f"{path} does not exist, expected what optimum_fp8.save wrote; {_hint(folder)}")
    said = read_json(path)
    if layout.key is not None:
        if layout.key not in said:
            raise FP8CheckpointError(
                f"{path} has no {layout.key!r}: the model was saved in high precision, or as a part of a converted "
                "one; use its from_pretrained, or save what convert returned"
            )
        said = said[layout.key]
    method = said.get("quant_method") if isinstance(said, dict) else None
    if method != QUANT_METHOD:
        raise FP8CheckpointError(f"{path} says quant_method={method!r}, expected {QUANT_METHOD!r}")
    return FP8Config.from_dict(said)


def _hint(folder: str) -> str:
    there = {name for name in ("model_index.json", "config.json") if os.path.isfile(os.path.join(folder, name))}
    if "model_index.json" in there:
        return (
            "it is a pipeline of diffusers: load its FP8 parts and hand them over, as in "
            f"DiffusionPipeline.from_pretrained({folder!r}, unet=load({os.path.join(folder, 'unet')!r}))"
        )
    if any(os.path.isfile(os.path.join(folder, name)) for name in (DIFFUSERS.weights, DIFFUSERS.index)):
        return f"it holds weights of a model of diffusers, but no {DIFFUSERS.config_file}: copy it again"
    return "it is a transformers checkpoint: use from_pretrained" if there else "use optimum_fp8.save"


def weight_files(folder: str, layout: Layout) -> list[str]:
    """The paths of the files of weights.

    Raises:
        FP8CheckpointError: names those that are not there.
    """
    refuse_without_index(folder)
    index = _index(folder, layout)
    names = [layout.weights] if index is None else sorted(set(index["weight_map"].values()))
    paths = [os.path.join(folder, name) for name in names]
    if absent := [path for path in paths if not os.path.isfile(path)]:
        raise FP8CheckpointError(f"{', '.join(absent)} does not exist: the folder is not whole, copy it again")
    return paths


def _index(folder: str, layout: Layout) -> dict[str, Any] | None:
    """The index of weights in several files; None where they are in one."""
    path = os.path.join(folder, layout.index)
    if not os.path.isfile(path):
        return None
    try:
        with open(path, encoding="utf-8") as file:
            index = json.load(file)
        return {"metadata": dict(index["metadata"]), "weight_map": dict(index["weight_map"])}
    except (ValueError, KeyError, TypeError) as error:
        raise FP8CheckpointError(f"{path} is damaged ({error}): copy it again") from None


def refuse_without_index(folder: str) -> None:
    """Refuse a folder with weights in several files, none of which is known to be needed without an index.

    Raises:
        FP8CheckpointError: names the index that is not there.
    """
    if (index := absent_index(folder)) is not None:
        raise FP8CheckpointError(
            f"{os.path.join(folder, index)} does not exist, which says what lies in which of the files of weights: the "
            "folder is not whole, copy it again"
        )


def absent_index(folder: str) -> str | None:
    """The name of the index that weights in several files need, and do not have; None: nothing is absent."""
    names = set(os.listdir(folder))
    for match in map(_SHARD.fullmatch, sorted(names)):
        if match and names.isdisjoint({f"{match[1]}.safetensors", index := f"{match[1]}.safetensors.index.json"}):
            return index
    return None


def read(folder: str, layout: Layout, files: Sequence[str]) -> tuple[dict[str, Any], Tensors]:
    """What was recorded when the model was saved, and its tensors, those that share memory as one tensor."""
    index, tensors = _index(folder, layout), Tensors()
    told = {} if index is None else read_record(os.path.join(folder, layout.index), index["metadata"])
    for path in files:
        with refuse_damaged(path), safe_open(path, framework="pt") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            told = told or read_record(path, file.metadata())
    tensors |= {name: tensors[kept] for name, kept in told.get("shared", {}).items() if kept in tensors}
    return told, tensors
