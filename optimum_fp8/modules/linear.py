"""nn.Linear and transformers' Conv1D in FP8."""

from __future__ import annotations

from typing import Any

import torch
from transformers.pytorch_utils import Conv1D

from .. import ops
from .base import FP8Module
from .recipe import Recipe


class FP8Linear(FP8Module):
    """y = x Wᵀ + b with an FP8 weight `[out, in]`.

    Conv1D (GPT-2) stores `[in, out]`; here the weight always is `[out, in]`, and `transposed` remembers the origin.
    """

    def __init__(self, origin: Any, recipe: Recipe):
        transposed = isinstance(origin, Conv1D)
        out_features, in_features = origin.weight.shape[::-1] if transposed else origin.weight.shape
        super().__init__(torch.Size((out_features, in_features)), origin, recipe)
        self.in_features, self.out_features, self.transposed = in_features, out_features, transposed

    def canonical(self, weight: torch.Tensor) -> torch.Tensor:
        return weight.t() if self.transposed else weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return ops.linear(
            x,
            self.weight,
            self.weight_scale,
            self.activation_scale(x),
            self.bias,
            full_scale=self.recipe.fmt.full_scale,
            arithmetic=self.recipe.arithmetic,
            owner=self.owner,
        )

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, {super().extra_repr()}"
