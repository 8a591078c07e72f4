"""The arguments of each operator as one value: what its reference, kernels and their refusals are given.

Fields have the names and the order of the operator's schema; shapes, dtypes and units are in the docstring of its
public function. The first field is the tensor whose device decides which kernels are asked.
"""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

import torch


class CastToCall(NamedTuple):
    """Of `cast_to_fp8`."""

    x: torch.Tensor
    scale: torch.Tensor
    dtype: torch.dtype
    full_scale: float


class CastByRangeCall(NamedTuple):
    """Of `cast_to_fp8_by_range`."""

    x: torch.Tensor
    scale_of_range: torch.Tensor
    per_row: bool
    dtype: torch.dtype
    full_scale: float


class CastFromCall(NamedTuple):
    """Of `cast_from_fp8`."""

    x: torch.Tensor
    scale: torch.Tensor
    dtype: torch.dtype


class MaxabsCall(NamedTuple):
    """Of `maxabs`."""

    x: torch.Tensor
    group: int


class HistogramCall(NamedTuple):
    """Of `histogram`."""

    x: torch.Tensor


class DynamicScaleCall(NamedTuple):
    """Of `dynamic_scale`."""

    x: torch.Tensor
    group: int
    divisor: float
    rounding: str
    fp8_config: str
    target: str
    hp_dtype: torch.dtype


class LinearCall(NamedTuple):
    """Of `linear`."""

    x: torch.Tensor
    weight: torch.Tensor
    weight_scale: torch.Tensor
    input_scale: torch.Tensor | None
    bias: torch.Tensor | None
    full_scale: float
    arithmetic: str


class LinearInputGradientCall(NamedTuple):
    """Of `linear_input_gradient`."""

    grad: torch.Tensor
    weight: torch.Tensor
    weight_scale: torch.Tensor
    x: torch.Tensor | None
    input_scale: torch.Tensor | None
    full_scale: float


class ConvCall(NamedTuple):
    """Of `conv`; the geometry has one value for each spatial dimension, as a list or a tuple."""

    x: torch.Tensor
    weight: torch.Tensor
    weight_scale: torch.Tensor
    input_scale: torch.Tensor | None
    bias: torch.Tensor | None
    stride: list[int]
    padding: list[int]
    dilation: list[int]
    transposed: bool
    output_padding: list[int]
    groups: int
    full_scale: float
    arithmetic: str


class EmbeddingCall(NamedTuple):
    """Of `embedding`."""

    x: torch.Tensor
    weight: torch.Tensor
    weight_scale: torch.Tensor
    dtype: torch.dtype


class MatmulCall(NamedTuple):
    """Of `matmul`."""

    a: torch.Tensor
    b: torch.Tensor
    a_scale: torch.Tensor | None
    b_scale: torch.Tensor | None
    dtype: torch.dtype
    full_scale: float
    arithmetic: str


class AttentionCall(NamedTuple):
    """Of `attention`."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    q_scale: torch.Tensor | None
    k_scale: torch.Tensor | None
    v_scale: torch.Tensor | None
    p_scale: torch.Tensor | None
    output_scale: torch.Tensor | None
    mask: torch.Tensor | None
    sinks: torch.Tensor | None
    scaling: float
    softcap: float
    dtype: torch.dtype
    full_scale: float
    dataflow: str


class AttentionWeightsCall(NamedTuple):
    """Of `attention_weights`: the fields of `AttentionCall` that the probabilities follow from."""

    query: torch.Tensor
    key: torch.Tensor
    q_scale: torch.Tensor | None
    k_scale: torch.Tensor | None
    p_scale: torch.Tensor | None
    mask: torch.Tensor | None
    sinks: torch.Tensor | None
    scaling: float
    softcap: float
    dtype: torch.dtype
    full_scale: float
    dataflow: str


class SoftmaxCall(NamedTuple):
    """Of `softmax`."""

    x: torch.Tensor
    scale: torch.Tensor
    factor: torch.Tensor | None
    dim: int
    dtype: torch.dtype
    full_scale: float


class ExpertsCall(NamedTuple):
    """Of `experts`."""

    x: torch.Tensor
    table: torch.Tensor
    router_weights: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor
    gate_up_scale: torch.Tensor
    down_scale: torch.Tensor
    input_scale: torch.Tensor | None
    intermediate_scale: torch.Tensor | None
    activation: str
    experts_min: int
    full_scale: float
    arithmetic: str


class GroupedLinearCall(NamedTuple):
    """Of `grouped_linear`."""

    x: torch.Tensor
    experts: torch.Tensor
    weight: torch.Tensor
    weight_scale: torch.Tensor
    input_scale: torch.Tensor | None
    bias: torch.Tensor | None
    full_scale: float
    arithmetic: str


Product: TypeAlias = LinearCall | ConvCall
