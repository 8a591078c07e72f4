"""nn.Linear and transformers' Conv1D in FP8."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from .. import ops
from ..errors import FP8StateError
from ..scales import Scheme
from .autocast import autocast
from .base import FP8Module
from .handler import register_handler
from .layer import LayerHandler
from .own_forward import run_own


class FP8LinearBase(FP8Module):
    """y = x Wᵀ + b with an FP8 weight `[out, in]`, whatever class it stands for."""

    def __init__(self, origin: Any, scheme: Scheme):
        super().__init__(self.to_out_in(origin.weight).shape, origin, scheme)
        self.out_features, self.in_features = self.weight_shape

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self.product(input, self._parameters["bias"])

    def product(self, input: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """`[…, out]` of an input `[…, in]`, with a bias `(out,)` or without, which may be that of the module or not."""
        parameters: dict[str, Any] = self._parameters  # attributes take longer
        scheme, x = self.scheme, autocast(input)
        input_scale = self.scale_of(x)
        try:
            return ops.linear(
                x,
                parameters["weight"],
                parameters["weight_scale"],
                input_scale,
                bias,
                full_scale=scheme.fmt.full_scale,
                arithmetic=scheme.arithmetic,
                record=self.record,
            )
        except (RuntimeError, IndexError):
            self._check_fit(input)
            raise

    def _check_fit(self, x: torch.Tensor) -> None:
        """After an error: say so if it is the input or the bias that does not fit."""
        self.check_bias()
        if x.ndim == 0 or x.shape[-1] != self.in_features:
            raise FP8StateError(
                f"{self.name}: an {type(self).__name__} of {self.in_features} input features was given "
                f"{tuple(x.shape)}, expected (…, {self.in_features}): look at what the model hands to this module"
            )

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, {super().extra_repr()}"


class FP8Linear(FP8LinearBase, nn.Linear):  # type: ignore[misc]
    """nn.Linear with an FP8 weight `[out, in]`."""


class FP8Conv1D(FP8LinearBase, Conv1D):  # type: ignore[misc]
    """transformers' Conv1D (GPT-2), a linear layer that stores its weight as `[in, out]`; its codes are `[out, in]`."""

    stores_in_out = True

    def to_out_in(self, weight: torch.Tensor) -> torch.Tensor:
        return weight.t() if weight.ndim == 2 else weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x)


class FP8OwnLinear(FP8Linear):
    """A linear layer in FP8 whose class has a forward of its own, which runs as it is around the product."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return run_own(self, self.origin, super().forward, *args, **kwargs)


register_handler(LayerHandler("transposed linear", (Conv1D,), FP8Conv1D))
register_handler(LayerHandler("linear", (nn.Linear,), FP8Linear, FP8OwnLinear))
