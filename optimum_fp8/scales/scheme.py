"""Scheme: how one module is scaled and computed, as a value. It knows no configuration and no module."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

from .. import ops
from ..formats import NumberFormat
from .activation import dynamic, dynamic_scale, scale_of_range
from .rule import ScaleRule

STATIC, DYNAMIC, WEIGHT_ONLY = "static", "dynamic", "weight_only"


@dataclass(frozen=True)
class Scheme:
    """What is done to one module; each kind of module takes from it what concerns it.

    Attributes:
        fmt: the number format of all codes.
        weight: the rule of the weight's scale.
        input: the rule of the input's scale, static or dynamic as `activations` says.
        operands: the rule of the scales of attention's query, key and value, and of cached keys and values.
        probabilities: the rule of the scale of the softmax's output.
        activations: "static" (calibrated), "dynamic" (from the very tensor) or "weight_only" (not rounded).
        hp_dtype: the dtype in which ranges are kept and per-tensor scales computed.
        arithmetic: where products round, one of `ops.ARITHMETICS`.
        dataflow: where attention rounds: "fused", "unfused" or "qdq".
        rounds_attention: whether attention's products take FP8 operands.
        caches: whether keys and values are stored in FP8.
        caches_windows: whether they are where attention has a sliding window.
        fp8_all_reduce: whether processes that split a layer by rows add up its results of new tokens in FP8.
        embeddings: whether tables of embeddings are stored in FP8.
        constant_scales: whether static scales are handed to operators as numbers, where a backend takes them.
    """

    fmt: NumberFormat
    weight: ScaleRule
    input: ScaleRule
    operands: ScaleRule
    probabilities: ScaleRule
    activations: str = DYNAMIC
    hp_dtype: torch.dtype = torch.bfloat16
    arithmetic: str = "fused"
    dataflow: str = "fused"
    rounds_attention: bool = False
    caches: bool = False
    caches_windows: bool = True
    fp8_all_reduce: bool = False
    embeddings: bool = False
    constant_scales: bool = True

    @property
    def is_static(self) -> bool:
        return self.activations == STATIC

    @property
    def is_dynamic(self) -> bool:
        return self.activations == DYNAMIC

    @cached_property
    def needs_ranges(self) -> bool:
        """Whether activations are scaled by calibrated ranges."""
        return self.is_static and self.input.needs_range

    def static_scale(self, maxabs: torch.Tensor | float, rule: ScaleRule | None = None) -> torch.Tensor:
        """The scale that follows from a calibrated range, by `rule` (by default the input's): float32, its shape."""
        return scale_of_range(maxabs, rule or self.input, self.fmt, self.hp_dtype)

    def dynamic_scale(self, x: torch.Tensor, rule: ScaleRule | None = None) -> torch.Tensor:
        """The scale of `x` `[…, features]` from its own range, by `rule` (by default the input's)."""
        return dynamic_scale(x, rule or self.input, self.fmt, self.hp_dtype)

    def dynamic(self, rule: ScaleRule | None = None) -> ops.DynamicScale | None:
        """What operators find the scale of an input by, if that is dynamic, by `rule` (by default the input's)."""
        return dynamic(rule or self.input, self.fmt, self.hp_dtype) if self.is_dynamic else None

    @property
    def attention_dataflow(self) -> str:
        """`dataflow` as attention's operators are told, one of `ops.DATAFLOWS`: a Gaudi rounds probabilities once."""
        return f"{self.dataflow}_gaudi" if self.fmt.is_gaudi and self.dataflow != "qdq" else self.dataflow

    @property
    def of_attention(self) -> str:
        """What concerns attention and caches, in words."""
        operands = f"{self.activations if self.is_static else DYNAMIC} {self.operands}"
        parts = [f"{self.fmt.name} on {self.fmt.target}", f"operands {operands}"]
        if self.rounds_attention:
            parts += [f"softmax {self.probabilities}", self.attention_dataflow]
        return ", ".join([*parts, *self._hp])

    @property
    def _hp(self) -> list[str]:
        return [] if self.hp_dtype == torch.bfloat16 else [f"scales in {str(self.hp_dtype).removeprefix('torch.')}"]

    def __str__(self) -> str:
        parts = [f"{self.fmt.name} on {self.fmt.target}", f"weight {self.weight}"]
        parts.append(f"activations {self.activations}{'' if self.activations == WEIGHT_ONLY else f' {self.input}'}")
        return ", ".join([*parts, *(["qdq"] if self.arithmetic == "qdq" else []), *self._hp])
