"""INC's scale files, from measurements: by our scale methods, of what INC scales in each kind of module."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..config import FP8Config
from ..errors import FP8MeasurementError
from ..measure.inc import FUSED, FUSED_SDPA, SOFTMAX, Node
from ..scales import PerTensor, Scheme, scale_of_weight
from ..scales.rule import value_of
from ..selection import scheme_for

_BLOCKS = ("batch2block_matmul", "block2batch_matmul")  # their second operand holds what is no data

Weights = Callable[[str], torch.Tensor | None]


def inc_scales(nodes: Mapping[str, Node], config: FP8Config, weight: Weights = lambda name: None) -> dict[str, Node]:
    """The scales that INC would make of measurements.

    Args:
        nodes: the ranges, by INC's names.
        config: the scale method, the format, the target and what modules differ in.
        weight: the weight of a module `[out, in, …]`; only asked for where its scale does not follow from its range.

    Raises:
        FP8MeasurementError: a weight is needed and not known, or its range is.
    """
    return {name: _scales(name, node, scheme_for(config, [name]), weight) for name, node in nodes.items()}


def weights_of(model: nn.Module) -> Weights:
    """The weights of a model by name, those of layers that vLLM fuses below each other."""

    modules = dict(model.named_modules())

    def weight(name: str) -> torch.Tensor | None:
        parent, dot, last = name.rpartition(".")
        parts = [name] if name in modules else [f"{parent}{dot}{part}" for part in FUSED.get(last, ())]
        found = [_out_in(modules[part]) for part in parts if part in modules]
        return torch.cat(found) if found and len(found) == len(parts) else None

    return weight


def _out_in(module: nn.Module) -> torch.Tensor:
    weight = module.weight.detach()  # type: ignore[union-attr, operator]
    return weight.T if isinstance(module, Conv1D) else weight  # type: ignore[return-value]


def _scales(name: str, node: Node, scheme: Scheme, weight: Weights) -> Node:
    inputs = [_of_range(value, scheme) for value in node.inputs or ()]
    outputs = [_of_range(value, scheme) for value in node.outputs or ()]
    last = name.rpartition(".")[2]
    if node.params:
        return _of_layer(name, node, scheme, weight, inputs, outputs)
    if last == FUSED_SDPA:
        return Node((*inputs, outputs[1]), (outputs[0],), {})
    if last == SOFTMAX:
        return Node((), (outputs[0],), {})
    if len(inputs) == 2:
        operands = (inputs[0], outputs[0]) if last in _BLOCKS else (inputs[0], inputs[1])
        return Node(operands, (_product(*operands, scheme),), {})
    if len(outputs) > 1:  # a mixture of experts: what goes into the last layer of each
        return Node((*inputs, *outputs[1:]), (outputs[0],), {})
    return Node(tuple(inputs), tuple(inputs), {})  # a cache hands out what it was given


def _of_layer(
    name: str, node: Node, scheme: Scheme, weight: Weights, inputs: list[torch.Tensor], outputs: list[torch.Tensor]
) -> Node:
    rule, per_tensor = scheme.weight, isinstance(scheme.weight.granularity, PerTensor)
    measured, values = (node.params or {}).get("weight"), None
    if value_of(rule).only_range and per_tensor:
        if measured is None:
            raise FP8MeasurementError(f"{name}: no range of its weight was measured: measure with PARAMS not excluded")
        values = measured.reshape(1, 1)
    elif (values := weight(name)) is None:
        raise FP8MeasurementError(f"{name}: the scale of its weight ({rule}) needs the weight: give the model")
    scale = scale_of_weight(values, rule, scheme.fmt, scheme.hp_dtype)
    scale = scale.reshape(()) if per_tensor else scale.flatten()
    params = {"weight": scale if per_tensor else {0: scale, 1: torch.ones(values.shape[1])}}
    split_by_rows = len(outputs) > 1  # vLLM's row-parallel layers
    return Node(tuple(inputs), (outputs[0] if split_by_rows else _product(scale, inputs[0], scheme),), params)


def _of_range(value: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    return scheme.static_scale(value.amax()).reshape(())


def _product(one: torch.Tensor, other: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """As INC multiplies scales: in hp_dtype."""
    return (one.to(scheme.hp_dtype) * other.to(scheme.hp_dtype)).float()
