"""How a module computes, as a value: number format, where roundings fall, and the rule of dynamic scales."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .. import ops
from ..config import FP8Config
from ..formats import NumberFormat, hp_torch_dtype
from ..scales import activation_divisor


@dataclass(frozen=True)
class DynamicRule:
    """How an activation's scale follows from the activation itself (see `ops.dynamic_scale`)."""

    per_token: bool
    divisor: float
    rounding: str
    hp_dtype: torch.dtype

    def scale(self, x: torch.Tensor, fmt: NumberFormat, rows_are_tokens: bool = True) -> torch.Tensor:
        """float32 `[…, 1]` (per token, where `x` has tokens) or `(1,)`."""
        return ops.dynamic_scale(
            x,
            per_token=self.per_token and rows_are_tokens,
            divisor=self.divisor,
            rounding=self.rounding,
            fp8_config=fmt.name,
            target=fmt.target,
            hp_dtype=self.hp_dtype,
        )


@dataclass(frozen=True)
class Recipe:
    """What every FP8 module of a model shares; `dynamic` is None for static and weight-only activations."""

    fmt: NumberFormat
    arithmetic: str
    per_channel: bool
    dynamic: DynamicRule | None = None


@dataclass(frozen=True)
class AttentionRecipe:
    """What all attention modules of a model share.

    Attributes:
        fmt: the number format.
        dataflow: where attention rounds (see `ops.reference_attention`).
        rounds: whether products take FP8 operands; without it only what comes out of an FP8 cache is FP8.
        rule: the rule of dynamic scales, one a token and head; None where scales are calibrated.
    """

    fmt: NumberFormat
    dataflow: str
    rounds: bool
    rule: DynamicRule | None = None


def attention_recipe_for(config: FP8Config) -> AttentionRecipe:
    """The recipe of attention and caches that a configuration asks for."""
    fmt, activation = config.number_format, config.method.activation
    rule = None
    if config.scheme in ("dynamic", "weight_only"):
        divisor = activation_divisor(activation, fmt, backoff=config.input_backoff, dynamic=True)
        rule = DynamicRule(True, divisor, activation.rounding, hp_torch_dtype(config.hp_dtype))
    return AttentionRecipe(fmt, "qdq" if config.use_qdq else config.attention_dataflow, config.attention, rule)


def recipe_for(config: FP8Config, *, dynamic: bool) -> Recipe:
    """The recipe a configuration asks for, with dynamic activations or without."""
    fmt, method = config.number_format, config.method
    rule = None
    if dynamic:
        activation = method.activation
        divisor = activation_divisor(activation, fmt, backoff=config.input_backoff, dynamic=True)
        rule = DynamicRule(
            activation.granularity == "token", divisor, activation.rounding, hp_torch_dtype(config.hp_dtype)
        )
    return Recipe(fmt, config.arithmetic, method.weight.granularity == "channel", rule)
