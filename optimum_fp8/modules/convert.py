"""From a high-precision module to its FP8 counterpart and back, and the one place that edits a module tree."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..config import FP8Config
from ..formats import NumberFormat
from ..scales import quantized_weight
from .base import FP8Module
from .conv import FP8Conv2d
from .linear import FP8Linear, share_inputs
from .recipe import Recipe

_FP8_CLASSES: dict[type[nn.Module], Callable[[nn.Module, Recipe], FP8Module]] = {
    nn.Linear: FP8Linear,
    Conv1D: FP8Linear,
    nn.Conv2d: FP8Conv2d,
}
_HOOKS = (
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
)


def fp8_skeleton(module: nn.Module, recipe: Recipe, name: str) -> FP8Module:
    """An FP8 module for the place of `module`, which is called `name`; its weight and scales are not set yet.

    Raises:
        FP8StateError: the module's bias does not fit its weight.
    """
    fp8_class = next(fp8 for kind, fp8 in _FP8_CLASSES.items() if isinstance(module, kind))
    made = fp8_class(module, recipe)
    made.name = name
    made.check_bias()
    return made


def fp8_modules(model: nn.Module) -> dict[str, FP8Module]:
    """All FP8 modules of `model` by qualified name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, FP8Module)}


def quantize_weight(
    weight: torch.Tensor, config: FP8Config, fmt: NumberFormat
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes, scale and range of a weight with output channels first.

    Args:
        weight: `[out, in, …]`, a floating-point dtype.

    Returns:
        `[out, in, …]` in FP8; the float32 scale, `(1,)` or `(out, 1, …)`; max|w| in float32, one or one a channel.

    Raises:
        FP8ScaleError: the weight holds NaN or Inf.
    """
    return quantized_weight(
        weight,
        method=config.scale_method,
        target=fmt.target,
        fp8_config=fmt.name,
        hp_dtype=config.hp_dtype,
        backoff=config.weight_backoff,
    )


def swap(model: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> None:
    """Put each replacement wherever its original stands in `model`, shared modules included."""
    places = [
        (parent, name, child)
        for parent in list(model.modules())
        for name, child in parent._modules.items()
        if child is not None and child in replacements
    ]
    for parent, name, child in places:
        new = replacements[child]
        new.train(child.training)
        for hooks in _HOOKS:
            setattr(new, hooks, getattr(child, hooks))
        if hasattr(child, "_hf_hook") and not hasattr(new, "_hf_hook"):  # accelerate moves inputs between devices
            from accelerate.hooks import add_hook_to_module

            add_hook_to_module(new, child._hf_hook)
        parent._modules[name] = new
    for parent in {parent for parent, _, _ in places}:
        share_inputs(parent)
