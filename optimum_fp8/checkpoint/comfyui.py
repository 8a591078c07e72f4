"""Single files in FP8 as ComfyUI and its converters write them: what their tensors and their header say.

- `X.weight` in float8_e4m3fn or float8_e5m2: codes, `[out, in, …]`;
- `X.weight_scale`, in old files `X.scale_weight`: float32, one number, or one for each output channel, and a value is
  its code times the scale;
- `X.input_scale`, in old files `X.scale_input`: float32, one number; 1 in an old file means that it was not calibrated;
- `_quantization_metadata` in the header, or `X.comfy_quant`, JSON as bytes: the format of each layer, and
  `full_precision_matrix_mult`, with which its input is not rounded;
- `scaled_fp8`, in old files: there are scales, and where it has two elements no input is rounded.

A file with codes and none of the rest is a cast to FP8: by definition each of its scales is 1.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import safe_open

from ..errors import FP8CheckpointError
from ..formats import is_fp8
from .folder import Tensors
from .native import refuse_damaged

METADATA, _PER_LAYER, _MARKER = "_quantization_metadata", "comfy_quant", "scaled_fp8"
_PREFIXES = ("model.diffusion_model.", "diffusion_model.")  # of the diffusion model in a file of a whole pipeline
_FORMATS = {"float8_e4m3fn": torch.float8_e4m3fn, "float8_e5m2": torch.float8_e5m2}
_SCALES = {"weight_scale": "weight", "scale_weight": "weight", "input_scale": "input", "scale_input": "input"}
_NOT_CALIBRATED = "scale_input"  # where it is 1
_OTHER_SCALES = ("weight_scale_2", "pre_quant_scale")  # of formats with two of them


@dataclass
class SingleFile:
    """What a file holds, by the names in it.

    Attributes:
        path: of the file, for messages.
        tensors: codes and all that is in high precision.
        weight_scales: of the codes, by the name of the weight, `(1,)` or `(out, 1, …)`.
        input_scales: `(1,)`, by the name of the weight, where there are any.
        high_precision: names of the weights whose products are to be computed without rounding their input.
    """

    path: str
    tensors: Tensors
    weight_scales: Tensors
    input_scales: Tensors
    high_precision: set[str]


def read_comfyui(path: str | os.PathLike[str]) -> SingleFile:
    """Read a single file in FP8.

    Raises:
        FP8CheckpointError: names the layer whose scale is missing or does not fit, or whose format is not known.
    """
    path = os.fspath(path)
    if not os.path.isfile(path):
        why = "is a folder" if os.path.isdir(path) else "does not exist"
        raise FP8CheckpointError(f"{path} {why}, expected a safetensors file with weights in FP8")
    with refuse_damaged(path), safe_open(path, framework="pt") as file:
        tensors: Tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata: Mapping[str, str] = file.metadata() or {}
    tensors = _of_diffusion_model(tensors)
    marker, said = tensors.pop(_MARKER, None), _said(path, metadata, tensors)
    scales = _taken_scales(path, tensors)
    codes = {name: tensor for name, tensor in tensors.items() if is_fp8(tensor.dtype)}
    if not codes:
        raise FP8CheckpointError(f"{path} holds no tensor in FP8: load it as any file in high precision")
    found = SingleFile(path, tensors, {}, {}, set())
    scaled = marker is not None or bool(said) or bool(scales["weight"])
    if scaled:
        _check_layers(path, said, codes)
    for name, tensor in codes.items():
        layer = name.removesuffix(".weight")
        weight_scale = scales["weight"].pop(layer, None)
        if weight_scale is None and scaled:
            raise FP8CheckpointError(
                f"{path}: {name} is in {tensor.dtype} and has no {layer}.weight_scale, though the file has scales: it "
                "is damaged, or was written in a way that is not known"
            )
        found.weight_scales[name] = _weight_scale(path, name, tensor, weight_scale)
        if (input_scale := scales["input"].pop(layer, None)) is not None:
            found.input_scales[name] = _single(path, f"{layer}.input_scale", input_scale)
        if said.get(layer, {}).get("full_precision_matrix_mult") or (marker is not None and marker.numel() == 2):
            found.high_precision.add(name)
    if left := sorted({*scales["weight"], *scales["input"]}):
        raise FP8CheckpointError(f"{path} has a scale of {left[0]}, whose weight is not in FP8: the file is damaged")
    return found


def _of_diffusion_model(tensors: Tensors) -> Tensors:
    """The tensors of the diffusion model, by their names in it."""
    prefix = next((prefix for prefix in _PREFIXES if any(name.startswith(prefix) for name in tensors)), "")
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _said(path: str, metadata: Mapping[str, str], tensors: Tensors) -> dict[str, dict[str, Any]]:
    """What the file says of its layers, by their names; the tensors that say it are taken out."""
    said: dict[str, dict[str, Any]] = {}
    try:
        if METADATA in metadata:
            layers = _of_diffusion_model(json.loads(metadata[METADATA])["layers"])
            said |= {name: each if isinstance(each, dict) else {"format": each} for name, each in layers.items()}
        for name in [name for name in tensors if name.endswith(f".{_PER_LAYER}")]:
            text = bytes(tensors.pop(name).tolist()).decode()
            said[name.removesuffix(f".{_PER_LAYER}")] = dict(json.loads(text))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise FP8CheckpointError(f"{path} says in no readable way how it is quantized ({error}): damaged") from None
    return said


def _taken_scales(path: str, tensors: Tensors) -> dict[str, Tensors]:
    """The scales of weights and of inputs by layer, taken out of the tensors."""
    scales: dict[str, Tensors] = {"weight": {}, "input": {}}
    for name in list(tensors):
        layer, _, leaf = name.rpartition(".")
        if leaf in _OTHER_SCALES:
            raise FP8CheckpointError(
                f"{path}: {name} belongs to a format with several scales a weight: read are {', '.join(_FORMATS)}"
            )
        if leaf in _SCALES:
            scale = tensors.pop(name)
            if not (leaf == _NOT_CALIBRATED and scale.numel() == 1 and float(scale) == 1.0):
                scales[_SCALES[leaf]][layer] = scale
    return scales


def _check_layers(path: str, said: Mapping[str, Mapping[str, Any]], codes: Mapping[str, torch.Tensor]) -> None:
    """Refuse layers of which the file says what is not known, or what their weight is not."""
    for layer, each in said.items():
        name, known = each.get("format"), ", ".join(_FORMATS)
        if name not in _FORMATS:
            raise FP8CheckpointError(f"{path}: {layer} is in the format {name!r}, expected one of {known}")
        weight = codes.get(f"{layer}.weight")
        if weight is None or weight.dtype is not _FORMATS[name]:
            found = "missing or not in FP8" if weight is None else f"in {weight.dtype}"
            raise FP8CheckpointError(f"{path} says that {layer} is in {name}, but its weight is {found}: damaged")


def _weight_scale(path: str, name: str, codes: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    """The scale of codes, float32 `(1,)` or `(out, 1, …)`."""
    if scale is None:
        return torch.ones(1)
    rows = codes.shape[0] if codes.ndim else 1
    if scale.numel() == 1:
        return scale.float().reshape(1)
    if codes.ndim > 1 and scale.numel() == rows and scale.shape[0] == rows:
        return scale.float().reshape(rows, *[1] * (codes.ndim - 1))
    raise FP8CheckpointError(
        f"{path}: the scale of {name} has shape {tuple(scale.shape)}, expected one number, or {rows}, one for each "
        "output channel"
    )


def _single(path: str, name: str, scale: torch.Tensor) -> torch.Tensor:
    if scale.numel() != 1:
        raise FP8CheckpointError(f"{path}: {name} has shape {tuple(scale.shape)}, expected one number")
    return scale.float().reshape(1)
