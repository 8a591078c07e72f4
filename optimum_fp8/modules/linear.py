"""nn.Linear and transformers' Conv1D in FP8."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from .. import ops
from .base import FP8Module
from .recipe import Recipe


class FP8Linear(FP8Module):
    """y = x Wᵀ + b with an FP8 weight `[out, in]`.

    Conv1D (GPT-2) stores `[in, out]`; here the weight always is `[out, in]`, and `transposed` remembers the origin.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: nn.Parameter | None,
        recipe: Recipe,
        device: torch.device,
        transposed: bool = False,
    ):
        super().__init__(torch.Size((out_features, in_features)), bias, recipe, device)
        self.in_features, self.out_features = in_features, out_features
        self.transposed = transposed

    @classmethod
    def like(cls, module: Any, recipe: Recipe) -> FP8Linear:
        weight, transposed = module.weight, isinstance(module, Conv1D)
        out_features, in_features = weight.shape[::-1] if transposed else weight.shape
        return cls(in_features, out_features, module.bias, recipe, weight.device, transposed)

    def canonical(self, weight: torch.Tensor) -> torch.Tensor:
        return weight.t() if self.transposed else weight

    def restored(self, dtype: torch.dtype) -> nn.Module:
        weight = self.dequantized_weight(dtype)
        with torch.device("meta"):
            module: Any = (
                Conv1D(self.out_features, self.in_features)
                if self.transposed
                else nn.Linear(self.in_features, self.out_features, bias=self.bias is not None)
            )
        module.weight = nn.Parameter(self.canonical(weight).contiguous())
        module.bias = self.bias
        return module

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
