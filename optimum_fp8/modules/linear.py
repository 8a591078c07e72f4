"""nn.Linear and transformers' Conv1D in FP8."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from .. import ops
from ..errors import FP8StateError
from ..scales import Scheme
from .base import FP8Module
from .handler import register_handler
from .layer import LayerHandler


class FP8Linear(FP8Module):
    """y = x Wᵀ + b with an FP8 weight `[out, in]`.

    Conv1D (GPT-2) stores `[in, out]`; here the weight always is `[out, in]`, and `transposed` remembers the origin.
    """

    def __init__(self, origin: Any, scheme: Scheme):
        transposed = isinstance(origin, Conv1D)
        out_features, in_features = origin.weight.shape[::-1] if transposed else origin.weight.shape
        super().__init__(torch.Size((out_features, in_features)), origin, scheme)
        self.in_features, self.out_features, self.transposed = in_features, out_features, transposed

    def to_out_in(self, weight: torch.Tensor) -> torch.Tensor:
        return weight.t() if self.transposed else weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parameters: dict[str, Any] = self._parameters  # attributes take longer
        scheme = self.scheme
        try:
            return ops.linear(
                x,
                parameters["weight"],
                parameters["weight_scale"],
                self.activation_scale(x),
                parameters["bias"],
                full_scale=scheme.fmt.full_scale,
                arithmetic=scheme.arithmetic,
                record=self.record,
            )
        except (RuntimeError, IndexError):
            self._check_fit(x)
            raise

    def _check_fit(self, x: torch.Tensor) -> None:
        """After an error: say so if it is the input or the bias that does not fit."""
        self.check_bias()
        if x.ndim == 0 or x.shape[-1] != self.in_features:
            raise FP8StateError(
                f"{self.name}: an FP8Linear of {self.in_features} input features was given {tuple(x.shape)}, expected "
                f"(…, {self.in_features}): look at what the model hands to this module"
            )

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, {super().extra_repr()}"


# FalconLinear has a forward of its own that computes just what nn.Linear's does.
register_handler(LayerHandler("linear", (nn.Linear, Conv1D), FP8Linear, equivalents=("FalconLinear",)))
