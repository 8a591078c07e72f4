"""Fake quantization of layers with one weight: linear layers, convolutions, embeddings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .autocast import autocast
from .fake_quant import Delay, FakeQuant
from .handler import Target
from .own_forward import run_own, torch_class


class LayerFakeQuant(FakeQuant):
    """Runs a layer's own forward, of a rounded weight and a rounded input.

    Args:
        target: the layer.
        delay: from when on, and until when, scales follow from what is seen.
        to_out_in: its weight with output channels first, given the layer and the weight, and the other way round.
        runs_own: whether its class has a forward of its own around the product of the class it derives from.
        rows_are_tokens: whether the last dimension of an input is its features.
    """

    def __init__(
        self,
        target: Target,
        delay: Delay,
        to_out_in: Callable[[Any, torch.Tensor], torch.Tensor],
        runs_own: bool,
        rows_are_tokens: bool,
    ):
        layer = target.module
        shapes = {"weight": to_out_in(layer, layer.weight).shape}
        device = layer.weight.device
        super().__init__(target.name, target.scheme, delay, ("input",), shapes, device, rows_are_tokens)
        self.to_out_in, self.runs_own = to_out_in, runs_own

    def trained(self, module: Any, *args: Any, **kwargs: Any) -> Any:
        weight = self.to_out_in(module, self.weight("weight", self.to_out_in(module, module.weight)))
        layer = _with_weight(module, weight)
        if self.runs_own:
            forward = torch_class(type(module)).forward
            return run_own(layer, layer, lambda x: forward(layer, self.input(autocast(x))), *args, **kwargs)
        if args:
            args = (self.input(autocast(args[0])), *args[1:])
        else:
            (name, x), *rest = kwargs.items()
            kwargs = {name: self.input(autocast(x)), **dict(rest)}
        return type(module).forward(layer, *args, **kwargs)


def _with_weight(module: nn.Module, weight: torch.Tensor) -> Any:
    """A module that is like another one but for its weight, which need not be a parameter."""
    made = object.__new__(type(module))  # FSDP's classes cannot be copied
    object.__setattr__(made, "__dict__", {**vars(module), "_parameters": {**module._parameters, "weight": weight}})
    return made
