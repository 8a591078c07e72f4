"""Convolutions of transformers that standardize their weight in every call (BiT, hybrid ViT).

In FP8 the weight is standardized once, before it is quantized.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .conv import FP8Conv2d, LaterHandler
from .handler import register_handler


class StandardizedConv2d(nn.Conv2d):
    """A convolution whose weight is standardized already; `pad`, if there is one, is called before it."""

    pad: nn.Module | None

    def forward(self, hidden_state: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden_state if self.pad is None else self.pad(hidden_state))


class FP8StandardizedConv2d(FP8Conv2d):
    """2-D convolution with an FP8 weight that was standardized; `pad`, if there is one, is called before it."""

    pad: nn.Module | None

    def forward(self, hidden_state: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden_state if self.pad is None else self.pad(hidden_state))


class StandardizedConvHandler(LaterHandler):
    """Convolutions of a class that is known by its name, and by its `eps`."""

    def __init__(self) -> None:
        super().__init__("standardized conv", (StandardizedConv2d,), FP8StandardizedConv2d)
        self.types = ("WeightStandardizedConv2d",)

    @property
    def spoken_types(self) -> tuple[str, ...]:
        return ()  # models that have none need not be told of them

    def base_of(self, module: Any) -> type[nn.Module] | None:
        known = isinstance(module, nn.Conv2d) and type(module).__name__ in self.types and hasattr(module, "eps")
        return StandardizedConv2d if known else super().base_of(module)

    @torch.no_grad()
    def plain(self, module: Any) -> Any:
        if isinstance(module, StandardizedConv2d) or not isinstance(module._parameters.get("weight"), torch.Tensor):
            return module
        rows, plain = module.weight.reshape(1, module.out_channels, -1), copy.copy(module)
        weight = F.batch_norm(rows, None, None, training=True, momentum=0.0, eps=module.eps)
        plain.__class__ = StandardizedConv2d
        weight = nn.Parameter(weight.reshape_as(module.weight), requires_grad=False)
        plain._parameters = {**module._parameters, "weight": weight}
        return plain


register_handler(StandardizedConvHandler())
