"""diffusers' layers that can be given a LoRA, in FP8 as long as they have none."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..errors import FP8StateError
from .base import FP8Module
from .conv import FP8Conv2d
from .handler import register_handler
from .layer import LayerHandler
from .linear import FP8Linear

_MERGE = "merge it into the weight (fuse_lora), or remove it, before the model is converted"


def _refusal(module: Any) -> str | None:
    return None if module.lora_layer is None else f"it has a lora_layer: {_MERGE}"


def _check(module: FP8Module) -> None:
    if vars(module).get("lora_layer") is not None or module._modules.get("lora_layer") is not None:
        raise FP8StateError(f"{module.name}: an FP8 module was given a lora_layer, which it does not add: {_MERGE}")


class FP8LoRACompatibleLinear(FP8Linear):
    """y = x Wᵀ + b with an FP8 weight `[out, in]`; `scale` is that of a LoRA, and has no effect without one."""

    @classmethod
    def refuses(cls, module: Any) -> str | None:
        return _refusal(module) or super().refuses(module)

    def forward(self, hidden_states: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        _check(self)
        return super().forward(hidden_states)


class FP8LoRACompatibleConv(FP8Conv2d):
    """2-D convolution with an FP8 weight `[out, in / groups, kh, kw]`; `scale` has no effect without a LoRA."""

    @classmethod
    def refuses(cls, module: Any) -> str | None:
        if module.padding_mode != "zeros":
            return f"it pads with zeros whatever its padding_mode, which is {module.padding_mode!r}"
        return _refusal(module) or super().refuses(module)

    def forward(self, hidden_states: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        _check(self)
        return super().forward(hidden_states)


class LoRACompatibleHandler(LayerHandler):
    """Layers of a class that is known by its name, and by its `lora_layer`."""

    def __init__(self, kind: str, name: str, base: type[nn.Module], fp8_class: type[FP8Module]):
        super().__init__(kind, (), fp8_class)
        self.types, self._base = (name,), base

    @property
    def spoken_types(self) -> tuple[str, ...]:
        return ()  # models that have none need not be told of them

    def base_of(self, module: Any) -> type[nn.Module] | None:
        if not isinstance(module, self._base) or not hasattr(module, "lora_layer"):
            return None
        return next((cls for cls in type(module).__mro__ if cls.__name__ in self.types), None)


register_handler(LoRACompatibleHandler("LoRA linear", "LoRACompatibleLinear", nn.Linear, FP8LoRACompatibleLinear))
register_handler(LoRACompatibleHandler("LoRA conv", "LoRACompatibleConv", nn.Conv2d, FP8LoRACompatibleConv))
