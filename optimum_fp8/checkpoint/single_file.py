"""load_single_file: a model of diffusers (or any other) with the codes and scales of one file that is in FP8."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Mapping

import torch
import transformers
from torch import nn

from ..config import FP8Config
from ..errors import FP8CheckpointError, FP8ConfigError, FP8StateError
from ..formats import is_fp8
from ..lifecycle import refuse_second_time
from ..modules import LayerHandler
from ..modules.handler import ModuleHandler, find_all
from ..modules.weight import stored_weight
from ..scales import Scheme
from ..scales.scheme import DYNAMIC, STATIC, WEIGHT_ONLY
from ..selection import is_of_diffusers, select
from .comfyui import SingleFile, read_comfyui
from .diffusers_models import attach_to_diffusers
from .fill import fill
from .folder import Tensors
from .targets import target_to_load

logger = logging.getLogger(__name__)

Convert = Callable[[dict[str, torch.Tensor]], Mapping[str, torch.Tensor]]
_MADE_FOR = ("cuda", "cpu")  # the targets whose number format these files use
_FORMATS = {torch.float8_e4m3fn: "E4M3", torch.float8_e5m2: "E5M2"}
_METHODS = {1: "maxabs_arbitrary", 2: "act_maxabs_pow2_weights_pcs_maxabs_pow2"}  # by dimensions of a weight's scale


def load_single_file(
    path: str | os.PathLike[str],
    model: nn.Module,
    *,
    convert: Convert | None = None,
    activation_scheme: str = DYNAMIC,
    target: str | None = None,
) -> nn.Module:
    """Make `model` the FP8 model that is in one file, as ComfyUI has them; no weight is dequantized.

    Layers that the file has an input scale of round their input with it; those that it says to multiply in full
    precision do not round it; all others do as `activation_scheme` says. Tensors in FP8 that are no weight of a layer
    that can be in FP8 (of a norm, an embedding) become values in the model's dtype, as a line in the log tells.

    Args:
        path: a safetensors file.
        model: the architecture in high precision, on any device; on meta, what is read stays on the CPU.
        convert: what brings tensors by the file's names to the model's, where they differ; it may split and join rows.
            The converters of `diffusers.loaders.single_file_utils` are such functions.
        activation_scheme: "dynamic" or "weight_only".
        target: "gaudi2", "gaudi3", "cuda" or "cpu"; None: this machine's.

    Returns:
        `model` itself.

    Raises:
        FP8CheckpointError: the file is not in FP8, a scale is missing or has another shape, a format is not known, or
            the tensors are not those of the model. The model stays as it was.
        FP8StateError: the model is prepared or converted already, or is a transformers model.
        FP8ConfigError: an unknown target or scheme.
    """
    refuse_second_time(model, "load_single_file")
    if activation_scheme not in (DYNAMIC, WEIGHT_ONLY):
        raise FP8ConfigError(
            f"load_single_file: activation_scheme={activation_scheme!r}, expected {DYNAMIC!r} or {WEIGHT_ONLY!r}; "
            "layers that the file has an input scale of are static in any case"
        )
    if isinstance(model, transformers.PreTrainedModel):
        raise FP8StateError(f"load_single_file: {type(model).__name__} is a transformers model: use from_pretrained")
    file = _converted(read_comfyui(path), convert)
    config = _config(model, file, activation_scheme).replace(target=target_to_load("cpu", target))
    decisions = select(model, config)
    layers = {each.name: each.scheme for each in decisions if each.selected}
    made_for = config.resolved_target if config.resolved_target in _MADE_FOR else _MADE_FOR[0]
    state = fill(model, config, decisions, _tensors(model, file, layers), made_for=made_for, where=file.path)
    if is_of_diffusers(model):
        attach_to_diffusers(model, state)
    return model


def _config(model: nn.Module, file: SingleFile, activation_scheme: str) -> FP8Config:
    """The configuration by which layers are as the file has them: what most have, and overrides for the others."""
    layers = {name: handler for name, (_, handler) in find_all(model).items() if handler.family.replaced}
    in_fp8 = [name for name, handler in layers.items() if _is_in_fp8(file, name, handler)]
    if not in_fp8:
        raise FP8CheckpointError(
            f"{file.path} has no weight in FP8 of a layer of {type(model).__name__}: its names are like "
            f"{next(iter(file.weight_scales), '')!r}, and the model's like {next(iter(layers), '')!r}; pass `convert`"
        )
    keys: dict[tuple[str, str, str], list[str]] = {}
    for name in in_fp8:
        weight = f"{name}.weight"
        scheme = STATIC if weight in file.input_scales else activation_scheme
        scheme = WEIGHT_ONLY if weight in file.high_precision else scheme
        method = _METHODS[min(file.weight_scales[weight].ndim, 2)]
        keys.setdefault((scheme, method, _FORMATS[file.tensors[weight].dtype]), []).append(name)
    (base, *others) = (
        (dict(zip(("activation_scheme", "scale_method", "fp8_config"), key, strict=True)), names)
        for key, names in sorted(keys.items(), key=lambda entry: -len(entry[1]))
    )
    overrides = {f"^(?:{'|'.join(map(re.escape, names))})$": options for options, names in others}
    left_out = [f"^{re.escape(name)}$" for name in layers if name not in in_fp8]
    lists = {"blocklist": {"names": left_out, "types": []}, "quantize_lm_head": True}  # the file decides, no default
    return FP8Config(**base[0], overrides=overrides or None, **lists)


def _is_in_fp8(file: SingleFile, name: str, handler: ModuleHandler) -> bool:
    """Whether the file has codes of a layer, `[out, in, …]` as in memory."""
    fp8_class = handler.fp8_class if isinstance(handler, LayerHandler) else None
    return fp8_class is not None and not fp8_class.stores_in_out and f"{name}.weight" in file.weight_scales


def _tensors(model: nn.Module, file: SingleFile, layers: Mapping[str, Scheme]) -> Tensors:
    """What the model is filled with: codes and scales of layers, and values of all the rest in the model's dtypes."""
    dtypes = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    tensors, values = Tensors(), []
    for name, tensor in file.tensors.items():
        layer, dtype = name.removesuffix(".weight"), dtypes.get(name, tensor.dtype)
        if name in file.weight_scales and layer in layers:
            tensors[name] = stored_weight(tensor)
            tensors[f"{layer}.weight_scale"] = file.weight_scales[name]
            if layers[layer].is_static:
                tensors[f"{layer}.input_scale"] = file.input_scales[name]
        elif is_fp8(tensor.dtype):
            tensors[name] = (tensor.float() * file.weight_scales[name]).to(dtype)
            values.append(name)
        else:
            tensors[name] = tensor.to(dtype) if tensor.is_floating_point() and dtype.is_floating_point else tensor
    if values:
        shown = f"{', '.join(values[:4])}{', …' if len(values) > 4 else ''}"
        logger.info("%s: %d tensors in FP8 are in high precision in this model: %s", file.path, len(values), shown)
    return tensors


def _converted(file: SingleFile, convert: Convert | None) -> SingleFile:
    """The file by the names of a model.

    What becomes of the scales is found by converting them in place of the tensors, one for each row.
    """
    if convert is None:
        return file

    def rows(values: Tensors, otherwise: float) -> Tensors:
        made = Tensors()
        for name, tensor in file.tensors.items():
            shape = (*tensor.shape[:1], *[1] * (tensor.ndim - 1))
            made[name] = values.get(name, torch.tensor(otherwise)).expand(shape).clone()
        return dict(convert(made))

    tensors = convert(dict(file.tensors))
    if not isinstance(tensors, Mapping):
        raise FP8CheckpointError(
            f"{file.path}: `convert` returned {type(tensors).__name__}, expected a dict of tensors by the model's names"
        )
    tensors = dict(tensors)
    weight_scales, input_scales = rows(file.weight_scales, 1.0), rows(file.input_scales, torch.nan)
    exact = rows({name: torch.ones(1) for name in file.high_precision}, 0.0)
    made = SingleFile(file.path, tensors, {}, {}, set())
    for name, tensor in tensors.items():
        if not is_fp8(tensor.dtype):
            continue
        scale, inputs = weight_scales[name], input_scales[name].flatten()
        if scale.shape[:1] != tensor.shape[:1] or bool(inputs.isnan().any()) != bool(inputs.isnan().all()):
            raise FP8CheckpointError(
                f"{file.path}: `convert` makes {name} of rows that are not quantized alike, or moves them otherwise "
                "than by rows: its scales do not follow"
            )
        made.weight_scales[name] = scale.flatten()[:1] if bool((scale == scale.flatten()[0]).all()) else scale
        if not bool(inputs.isnan().all()):
            made.input_scales[name] = inputs.max().reshape(1)  # the larger range holds both
        if bool(exact[name].any()):
            made.high_precision.add(name)
    return made
