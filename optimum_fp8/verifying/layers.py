"""The layers of a checkpoint: which codes have which scales, and whether their names, dtypes and shapes are sound."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ..formats import is_fp8
from .finding import Finding, error, warning
from .formats import FUSED, INPUT_SCALES, MODELOPT, OURS, WEIGHT_SCALES, Rules, fits, is_left_out, without_unit_axes
from .opened import COPY, Header, Opened

_E8M0 = (torch.float8_e8m0fnu, torch.uint8)
_SCALE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, *_E8M0)
_AGAIN = "quantize the original model again, or copy the checkpoint again"


@dataclass(frozen=True)
class Layer:
    """A tensor of codes.

    Attributes:
        name: of its module.
        weight: the name of the codes.
        codes: dtype and shape of them, as `[out, in, …]` or stacked.
        scale: the name of its scale; None: there is none.
    """

    name: str
    weight: str
    codes: Header
    scale: str | None


def layers_in(opened: Opened) -> list[Layer]:
    """All tensors of FP8 codes, with their scales."""
    found = []
    for key, header in sorted(opened.tensors.items()):
        leaf = key.rpartition(".")[2]
        if header.dtype is None or not is_fp8(header.dtype) or "scale" in leaf:
            continue
        module = key.removesuffix(".weight")
        names = [f"{module}.{name}" for name in WEIGHT_SCALES] if leaf == "weight" else []
        names += [f"{key}_scale", f"{key}_scale_inv"]
        if leaf == "weight_ih" or leaf.startswith("weight_"):
            module = key.rpartition(".")[0]
        shape = (
            header.shape[1:] if opened.method == OURS and len(header.shape) > 2 and leaf == "weight" else header.shape
        )
        codes = Header(header.path, header.dtype, shape)
        found.append(Layer(module, key, codes, next((name for name in names if name in opened.tensors), None)))
    return found


def check_layers(opened: Opened, layers: list[Layer], rules: Rules) -> Iterator[Finding]:
    """What is wrong with names, dtypes and shapes."""
    if not layers and opened.tensors:
        yield error(
            opened.folder, "no tensor in FP8", "codes in float8_e4m3fn or float8_e5m2", "give an FP8 checkpoint"
        )
    for layer in layers:
        yield from _check_layer(opened, layer, rules)
    yield from _check_lone_scales(opened, layers)
    yield from _check_high_precision(opened, layers, rules)
    yield from _check_fused(opened, layers)


def _check_layer(opened: Opened, layer: Layer, rules: Rules) -> Iterator[Finding]:
    expected = " or ".join(f"{layer.name}.{name}" for name in rules.weight_scales)
    if layer.scale is None:
        yield error(layer.weight, f"codes in {layer.codes.dtype} without a scale", expected, _AGAIN)
    else:
        leaf, header = layer.scale.rpartition(".")[2], opened.tensors[layer.scale]
        shape = without_unit_axes(header.shape) if opened.method == MODELOPT else header.shape
        if layer.weight.endswith(".weight") and leaf not in rules.weight_scales:
            found = f"the scale of {layer.weight} by this name"
            yield error(layer.scale, found, expected, f"engines look for that in {opened.method or 'this format'}")
        if header.dtype not in _SCALE_DTYPES:
            yield error(layer.scale, str(header.dtype), "float32", _AGAIN)
        elif not fits(layer.codes.shape, shape, rules.block):
            expected = f"one that fits codes of shape {layer.codes.shape}"
            expected += f" in blocks of {rules.block}" if rules.block else ""
            yield error(layer.scale, f"a scale of shape {header.shape}", expected, _AGAIN)
    has_input = any(f"{layer.name}.{name}" in opened.tensors for name in INPUT_SCALES)
    if rules.static and layer.weight.endswith(".weight") and not has_input:
        found = "no scale of the input, though activations are static"
        yield error(layer.name, found, f"{layer.name}.input_scale", _AGAIN)
    if is_left_out(layer.name, rules.left_out):
        found = "codes in FP8, though the configuration lists it as an exception"
        yield error(layer.weight, found, "high precision", "take it from the list, or quantize again")


def _check_lone_scales(opened: Opened, layers: list[Layer]) -> Iterator[Finding]:
    owned, modules = {layer.scale for layer in layers}, {layer.name for layer in layers}
    for key in sorted(opened.tensors):
        module, _, leaf = key.rpartition(".")
        if leaf in WEIGHT_SCALES and key not in owned and module not in modules and leaf != "scale":
            there = opened.tensors.get(f"{module}.weight")
            dtype = None if there is None else there.dtype
            if dtype not in (torch.uint8, torch.int8, torch.int32):  # codes of another kind than FP8
                found = f"a scale whose weight is {'missing' if there is None else f'in {dtype}'}"
                yield error(key, found, f"codes in {module}.weight", COPY)


def _check_high_precision(opened: Opened, layers: list[Layer], rules: Rules) -> Iterator[Finding]:
    """Layers in high precision whose like is in FP8, without the configuration saying so."""
    alike = {layer.name.rpartition(".")[2] for layer in layers if "." in layer.name}
    for key, header in sorted(opened.tensors.items()):
        name = key.removesuffix(".weight")
        if name == key or len(header.shape) < 2 or header.dtype is None or header.dtype.itemsize < 2:
            continue
        if name.rpartition(".")[2] in alike and not is_left_out(name, rules.left_out):
            yield error(
                key, f"high precision ({header.dtype}), though others like it are in FP8",
                "codes in FP8, or its name among the exceptions of the configuration", _AGAIN,
            )  # fmt: skip


def _check_fused(opened: Opened, layers: list[Layer]) -> Iterator[Finding]:
    """Layers that engines fuse must all be in FP8, or none of them."""
    names = {layer.name for layer in layers}
    parents = {name.rpartition(".")[0] for name in names}
    for parent in sorted(parents):
        for group in FUSED:
            there = [f"{parent}.{leaf}" for leaf in group if f"{parent}.{leaf}.weight" in opened.tensors]
            kept = [name for name in there if name not in names]
            if kept and len(kept) < len(there):
                found = f"{', '.join(kept)} in high precision beside others in FP8"
                action = f"engines fuse {', '.join(group)}: list all of them as exceptions, or none"
                yield warning(parent, found, "all in FP8 or none", action)
