"""What all FP8 modules with a weight have in common: their state, and how it survives moves, casts and copies."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .. import ops
from ..formats import is_fp8
from .recipe import Recipe


class FP8Module(nn.Module):
    """A module that holds an FP8 weight, its scale, and (static activations) the scale of its input.

    Attributes:
        weight: `[out, in, …]`, FP8, frozen.
        weight_scale: float32, `(1,)` or `(out, 1, …)`; NaN until it is set.
        input_scale: float32 `(1,)`, or None where activations are not rounded, or rounded dynamically.
        bias: `(out,)` in high precision, or None.
        recipe: how it computes.
        owner: the number its operator calls are counted under.
    """

    rows_are_tokens = True  # whether the last dimension of an input is its features

    weight: nn.Parameter
    weight_scale: nn.Parameter
    input_scale: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(self, shape: torch.Size, bias: nn.Parameter | None, recipe: Recipe, device: torch.device):
        super().__init__()
        self.recipe = recipe
        self.owner = ops.new_owner()
        scale_shape = (shape[0], *[1] * (len(shape) - 1)) if recipe.per_channel else (1,)
        scale = torch.full(scale_shape, torch.nan, dtype=torch.float32, device=device)
        self.weight = frozen(torch.empty(shape, dtype=recipe.fmt.dtype, device=device))
        self.weight_scale = frozen(scale)
        self.register_parameter("input_scale", None)
        self.register_parameter("bias", bias)

    @classmethod
    def like(cls, module: Any, recipe: Recipe) -> FP8Module:
        """An FP8 module for `module`'s place: same shapes, device and bias; weight and scales not set yet."""
        raise NotImplementedError

    def restored(self, dtype: torch.dtype) -> nn.Module:
        """The high-precision module of the original class, with the dequantized weight in `dtype`."""
        raise NotImplementedError

    def canonical(self, weight: torch.Tensor) -> torch.Tensor:
        """The original module's weight with output channels first."""
        return weight

    def set_weight(self, weight: torch.Tensor, scale: torch.Tensor) -> None:
        """Take FP8 codes and their float32 scale."""
        self.weight, self.weight_scale = frozen(weight), frozen(scale)

    def set_input_scale(self, scale: torch.Tensor | None) -> None:
        """Take the static scale of the input, `(1,)`; None computes with unrounded activations."""
        self.input_scale = None if scale is None else frozen(scale.to(self.weight.device, torch.float32))

    def activation_scale(self, x: torch.Tensor) -> torch.Tensor | None:
        """The scale to round `x` with: the rule's, the calibrated one, or none."""
        if self.recipe.dynamic is not None:
            return self.recipe.dynamic.scale(x, self.recipe.fmt, self.rows_are_tokens)
        return self.input_scale

    @property
    def activations(self) -> str:
        """ "dynamic", "static" or "weight_only"."""
        if self.recipe.dynamic is not None:
            return "dynamic"
        return "weight_only" if self.input_scale is None else "static"

    def dequantized_weight(self, dtype: torch.dtype) -> torch.Tensor:
        """weight · weight_scale, `[out, in, …]` in `dtype`."""
        return ops.cast_from_fp8(self.weight, self.weight_scale, dtype)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> FP8Module:
        """Moves go through; casts do not: an FP8 weight cast to another dtype would lose its scale silently."""

        def keep_dtype(tensor: torch.Tensor) -> torch.Tensor:
            applied = fn(tensor)
            keep = is_fp8(tensor.dtype) or any(tensor is scale for scale in (self.weight_scale, self.input_scale))
            return tensor.to(applied.device) if keep and applied.dtype != tensor.dtype else applied

        return super()._apply(keep_dtype, recurse)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.owner = ops.new_owner()  # a copy counts its own calls

    def extra_repr(self) -> str:
        fmt = self.recipe.fmt
        granularity = "per channel" if self.recipe.per_channel else "per tensor"
        return f"{fmt.name} on {fmt.target}, weight {granularity}, activations {self.activations}"


def frozen(tensor: torch.Tensor) -> nn.Parameter:
    """`tensor` as a parameter without gradient: FP8 has no norm kernels, and a scale must not drift."""
    return nn.Parameter(tensor.detach(), requires_grad=False)
