"""What the files of the FP8 checkpoint will hold, and what each tensor is made of: all decided before any is read."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards

from ..checkpoint.digests import FILES, RECORD, SAVE, signed
from ..checkpoint.safetensors_writer import TensorSpec
from ..config import FP8Config
from ..errors import FP8CheckpointError
from ..formats import is_fp8
from ..modules import FP8Module, fp8_modules
from ..modules.experts import SCALES
from ..modules.fused_experts import FP8FusedExperts
from ..scales import Scheme
from ..selection import Decision
from .source import Source, Stored


@dataclass(frozen=True)
class Layer:
    """A weight that becomes FP8.

    Attributes:
        name: of its module.
        stored: where it is.
        dtype: that it is cast to first, as loading the model does.
        scheme: how it is scaled.
        to_out_in: makes `[out, in, …]` of it.
        experts: of how many experts it is a stack; 0: it is one weight.
        halves: how many weights with scales of their own lie below each other in a matrix of the stack.
        together: weights that have one scale with it, itself among them.
    """

    name: str
    stored: Stored
    dtype: torch.dtype
    scheme: Scheme
    to_out_in: Callable[[torch.Tensor], torch.Tensor]
    experts: int = 0
    halves: int = 1
    together: tuple[Layer, ...] = ()


@dataclass(frozen=True)
class Output:
    """A tensor of the checkpoint: the codes (in FP8) or the scale of a layer, a tensor as it is stored, or a value."""

    name: str
    spec: TensorSpec
    made_of: Layer | Stored | torch.Tensor

    @property
    def is_codes(self) -> bool:
        return isinstance(self.made_of, Layer) and is_fp8(self.spec.dtype)

    @property
    def is_scale(self) -> bool:
        return isinstance(self.made_of, Layer) and not self.is_codes


@dataclass(frozen=True)
class Skeleton:
    """A converted model without values: on meta, but for what does not come from the files.

    Attributes:
        model: of transformers, or modules made of the names in the files.
        saved: its state as it goes to disk, by the names it has there.
        names: what `model` calls those tensors; those that transformers puts together while loading are not here.
        stored: what the files hold for the tensors of `model`, by its names.
        decisions: about its modules.
        config: that the checkpoint carries.
        record: what the files say of the model.
        kept: why matrices stay in high precision that are no candidates, by module.
        whole: whether the class of the model is known.
    """

    model: Any
    saved: Mapping[str, torch.Tensor]
    names: Mapping[str, str]
    stored: Mapping[str, Stored]
    decisions: list[Decision]
    config: FP8Config
    record: str
    kept: Mapping[str, str]
    whole: bool


@dataclass(frozen=True)
class Plan:
    """The files of weights to write.

    Attributes:
        shards: the tensors of each file.
        index: what `model.safetensors.index.json` says; None where there is one file.
        metadata: of each file.
        layers: all weights that become FP8, by module.
    """

    shards: dict[str, list[Output]]
    index: dict[str, Any] | None
    metadata: dict[str, str]
    layers: dict[str, Layer]

    def of_save(self, save: str) -> Plan:
        """The plan with an id of the save, and the number of its files, in what each of them says."""
        said = json.loads(self.metadata[RECORD]) | {SAVE: save, FILES: len(self.shards)}
        return replace(self, metadata={**self.metadata, RECORD: signed(said)})


def layers_of(skeleton: Skeleton) -> dict[str, Layer]:
    """The weights that become FP8, by the names of their modules."""
    layers = {
        name: Layer(name, skeleton.stored[f"{name}.weight"], module.high_precision, module.scheme, module.to_out_in)
        for name, module in fp8_modules(skeleton.model).items()
    }
    for name, module in skeleton.model.named_modules():
        if isinstance(module, FP8FusedExperts):
            layers |= {each.name: each for each in _of_experts(name, module, skeleton.stored)}
    return layers


def _of_experts(name: str, module: FP8FusedExperts, stored: Mapping[str, Stored]) -> Iterator[Layer]:
    """The weights of experts as the files have them: one by one, or as stacks."""
    dtype, scheme, layout = module.high_precision, module.scheme, module.layout
    for own, _, _ in module.weights() if module.parts else ():
        yield Layer(f"{name}.{own}", stored[f"{name}.{own}.weight"], dtype, scheme, lambda weight: weight)
    for own in () if module.parts else module.stack_names:
        count, halves = len(module.numbers), module.halves[own]
        to_out_in = partial(_matrices, count=count, transposed=own in layout.transposed)
        yield Layer(f"{name}.{own}", stored[f"{name}.{own}"], dtype, scheme, to_out_in, count, halves)


def _matrices(stack: torch.Tensor, *, count: int, transposed: bool) -> torch.Tensor:
    """`[experts, out, in]` of a stack as it is stored, which may have the matrices of all experts below each other."""
    stack = stack.unflatten(0, (count, -1)) if stack.ndim == 2 else stack[:count]
    return stack.mT if transposed else stack


def _scheme(model: Any, name: str) -> Scheme | None:
    """The scheme of the layer or the experts with a name; None: it is no name of some."""
    module = model.get_submodule(name)
    return module.scheme if isinstance(module, (FP8Module, FP8FusedExperts)) else None


def plan(source: Source, skeleton: Skeleton, layers: dict[str, Layer], max_shard_size: int | str) -> Plan:
    """Which tensors go into which file, as `save_pretrained` divides them.

    Raises:
        FP8CheckpointError: the files lack a tensor of the model, or hold one of another shape.
    """
    outputs = {name: _output(name, tensor, source, skeleton, layers) for name, tensor in skeleton.saved.items()}
    split = split_torch_state_dict_into_shards(
        dict(skeleton.saved), filename_pattern="model{suffix}.safetensors", max_shard_size=max_shard_size
    )
    index = None
    if split.is_sharded:
        parameters = sum(parameter.numel() for parameter in skeleton.model.parameters())
        metadata = {"total_parameters": parameters, **split.metadata}
        index = {"metadata": metadata, "weight_map": split.tensor_to_filename}
    shards = {file: [outputs[name] for name in names] for file, names in split.filename_to_tensors.items()}
    return Plan(shards, index, {"format": "pt", RECORD: skeleton.record}, layers)


def with_shared_scales(layers: Mapping[str, Layer], groups: list[list[str]]) -> dict[str, Layer]:
    """The layers, those of a group of names with one scale."""
    shared = dict(layers)
    for names in groups:
        together = tuple(layers[name] for name in names)
        shared |= {each.name: replace(each, together=together) for each in together}
    return shared


def _output(name: str, tensor: torch.Tensor, source: Source, skeleton: Skeleton, layers: Mapping[str, Layer]) -> Output:
    spec, known = TensorSpec(tensor.dtype, tuple(tensor.shape)), skeleton.names.get(name)
    if known is not None:
        module, _, leaf = known.rpartition(".")
        if module in layers and (leaf == "weight_scale" or (leaf == "weight" and is_fp8(tensor.dtype))):
            return Output(name, spec, layers[module])
        if known.removesuffix("_scale") in layers:  # a stack
            return Output(name, spec, layers[known.removesuffix("_scale")])
        if leaf in SCALES and (scheme := _scheme(skeleton.model, module)) is not None:  # one that needs no range
            return Output(name, spec, scheme.static_scale(torch.zeros(())).expand(spec.shape).clone())
    if not tensor.is_meta:
        return Output(name, spec, tensor.detach().clone())
    stored = source.tensors.get(name) if known is None else skeleton.stored.get(known)
    kind = type(skeleton.model).__name__
    if stored is None:
        raise FP8CheckpointError(
            f"{source.folder} holds nothing for {known or name}, which {kind} has and would be given at random, or "
            "puts together of others: load the model with from_pretrained(…, quantization_config=…) and save it"
        )
    if stored.shape != spec.shape:
        raise FP8CheckpointError(
            f"{stored} is {stored.shape}, but {kind} expects {spec.shape}: the files are not those of its config.json"
        )
    return Output(name, spec, stored)
