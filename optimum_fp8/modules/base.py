"""What all FP8 modules with a weight have in common: their state, and how it survives moves, casts and copies."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .. import ops
from ..errors import FP8StateError
from ..formats import is_fp8
from .recipe import Recipe

_HIGH_PRECISION = frozenset({torch.bfloat16, torch.float16, torch.float32, torch.float64})


class FP8Module(nn.Module):
    """A module that holds an FP8 weight, its scale, and (static activations) the scale of its input.

    Attributes:
        weight: `[out, in, …]`, FP8, frozen.
        weight_scale: float32, `(1,)` or `(out, 1, …)`; NaN until it is set.
        input_scale: float32 `(1,)`, or None where activations are not rounded, or rounded dynamically.
        bias: `(out,)` in high precision, or None.
        origin: the module this one stands for, without its parameters.
        high_precision: the dtype its weight had, or would have been cast to since.
        recipe: how it computes.
        owner: the number its operator calls are counted under.
        name: of the module in its model, for messages.
    """

    rows_are_tokens = True  # whether the last dimension of an input is its features
    managed = False  # whether a transformers quantizer saves it

    weight: nn.Parameter
    weight_scale: nn.Parameter
    input_scale: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(self, shape: torch.Size, origin: Any, recipe: Recipe):
        super().__init__()
        device = origin.weight.device
        self.__dict__["origin"] = _shell(origin)  # not a submodule
        self.high_precision: torch.dtype = origin.weight.dtype
        self.recipe = recipe
        self.owner = ops.new_owner()
        self.name = ""
        scale_shape = (shape[0], *[1] * (len(shape) - 1)) if recipe.per_channel else (1,)
        scale = torch.full(scale_shape, torch.nan, dtype=torch.float32, device=device)
        # The bias comes first: transformers takes the dtype of a model's first parameter for the model's.
        self.register_parameter("bias", origin.bias)
        self.weight = frozen(torch.empty(shape, dtype=recipe.fmt.dtype, device=device))
        self.weight_scale = frozen(scale)
        self.register_parameter("input_scale", None)

    def canonical(self, weight: torch.Tensor) -> torch.Tensor:
        """The original module's weight with output channels first, and the other way round."""
        return weight

    def restored(self, dtype: torch.dtype | None = None) -> nn.Module:
        """The original module, with the dequantized weight in `dtype` (by default `high_precision`)."""
        module, dtype = _shell(self.origin), dtype or self.high_precision
        module.weight = nn.Parameter(self.canonical(self.dequantized_weight(dtype)).contiguous())
        module.bias = self.bias
        return module

    def set_weight(self, weight: torch.Tensor, scale: torch.Tensor) -> None:
        """Take FP8 codes and their float32 scale."""
        self.weight, self.weight_scale = frozen(weight), frozen(scale)

    def start(self, recipe: Recipe, input_scale: torch.Tensor | None) -> None:
        """Compute by `recipe` from now on, with a static scale `(1,)` of the input or none, and count calls anew."""
        self.recipe, self.owner = recipe, ops.new_owner()
        self.input_scale = None if input_scale is None else frozen(input_scale.to(self.weight.device, torch.float32))

    def activation_scale(self, x: torch.Tensor) -> torch.Tensor | None:
        """The scale to round `x` with: the rule's, the calibrated one, or none.

        Raises:
            FP8StateError: `x` is not in high precision (some code cast it to this weight's dtype, without a scale), or
                the weight is no longer in FP8.
        """
        if x.dtype not in _HIGH_PRECISION:
            raise FP8StateError(
                f"{self.name}: an FP8 module was given an input in {x.dtype}, but expects high precision; where code "
                "around it cast it to the dtype of the weight, without a scale, put the module on the blocklist"
            )
        recipe = self.recipe
        self.check_codes()
        return self.input_scale if recipe.dynamic is None else recipe.dynamic.scale(x, recipe.fmt, self.rows_are_tokens)

    def check_codes(self) -> None:
        """Refuse a weight that is no longer in FP8.

        Raises:
            FP8StateError: names its dtype.
        """
        if self.weight.dtype is not self.recipe.fmt.dtype:
            raise FP8StateError(
                f"the weight of an FP8 module was replaced by one in {self.weight.dtype}: expected "
                f"{self.recipe.fmt.dtype} with its scale; convert the original model again"
            )

    def check_bias(self) -> None:
        """Refuse a bias that does not have one value for each output channel.

        Raises:
            FP8StateError: names the module, and what is expected.
        """
        if self.bias is not None and self.bias.shape != self.weight.shape[:1]:
            raise FP8StateError(
                f"{self.name}: the bias of {type(self.origin).__name__} has shape {tuple(self.bias.shape)}, expected "
                f"{tuple(self.weight.shape[:1])}, one value for each output: give the module a bias that fits, or None"
            )

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
            if is_fp8(tensor.dtype) and applied.dtype != tensor.dtype:
                self.high_precision = applied.dtype
            return tensor.to(applied.device) if keep and applied.dtype != tensor.dtype else applied

        return super()._apply(keep_dtype, recurse)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """Outside of a transformers quantizer, which does it when saving, weights are handed out as they go to disk:
        with a leading dimension of one, so that code that knows nothing of their scales cannot take them for values."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if not self.managed:
            destination[f"{prefix}weight"] = destination[f"{prefix}weight"].unsqueeze(0)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        """Only FP8 codes with sound scales are taken."""
        errors: list[str] = args[-1]
        weight = state_dict.get(f"{prefix}weight")
        if weight is not None:
            if weight.dtype != self.weight.dtype:
                errors.append(f"{prefix}weight is {weight.dtype}, expected FP8 codes in {self.weight.dtype}")
            if f"{prefix}weight_scale" not in state_dict:
                errors.append(f"{prefix}weight_scale is missing: codes mean nothing without their scale")
            if weight.ndim == self.weight.ndim + 1 and weight.shape[0] == 1:
                state_dict[f"{prefix}weight"] = weight.squeeze(0)
        for name in ("weight_scale", "input_scale"):
            scale = state_dict.get(f"{prefix}{name}")
            if scale is not None and not bool((torch.isfinite(scale) & (scale > 0)).all()):
                errors.append(f"{prefix}{name} is {scale.flatten()[:4].tolist()}, expected finite values above 0")
        if not errors:
            super()._load_from_state_dict(state_dict, prefix, *args)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.owner = ops.new_owner()  # a copy counts its own calls

    def extra_repr(self) -> str:
        fmt = self.recipe.fmt
        granularity = "per channel" if self.recipe.per_channel else "per tensor"
        return f"{fmt.name} on {fmt.target}, weight {granularity}, activations {self.activations}"


def _shell(module: Any) -> Any:
    """A copy of a module without parameters, and without what accelerate hung on it."""
    shell = copy.copy(module)
    shell._parameters = dict.fromkeys(module._parameters)
    for name in ("forward", "_old_forward", "_hf_hook"):
        shell.__dict__.pop(name, None)
    return shell


def frozen(tensor: torch.Tensor) -> nn.Parameter:
    """`tensor` as a parameter without gradient: FP8 has no norm kernels, and a scale must not drift."""
    return nn.Parameter(tensor.detach(), requires_grad=False)
