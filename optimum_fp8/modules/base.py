"""What all FP8 modules with a weight have in common: their state, and how it survives moves, casts and copies."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from .. import ops
from ..errors import FP8StateError
from ..formats import is_fp8
from ..scales import PerTensor, ScaleRule, Scheme, unsound

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
        scheme: how it is scaled and computed.
        record: the calls of its operators.
        name: of the module in its model, for messages.
    """

    rows_are_tokens = True  # whether the last dimension of an input is its features
    managed = False  # whether a transformers quantizer saves it

    weight: nn.Parameter
    weight_scale: nn.Parameter
    input_scale: nn.Parameter | None
    bias: nn.Parameter | None
    scheme: Scheme
    record: ops.CallRecord

    def __init__(self, shape: torch.Size, origin: Any, scheme: Scheme):
        super().__init__()
        device = origin.weight.device
        self.__dict__["origin"] = _shell(origin)  # not a submodule
        self.high_precision: torch.dtype = origin.weight.dtype
        self.name = ""
        scale = torch.full(scheme.weight.granularity.scale_shape(shape), torch.nan, dtype=torch.float32, device=device)
        # The bias comes first: transformers takes the dtype of a model's first parameter for the model's.
        self.register_parameter("bias", getattr(origin, "bias", None))
        self.weight = frozen(torch.empty(shape, dtype=scheme.fmt.dtype, device=device))
        self.weight_scale = frozen(scale)
        self.register_parameter("input_scale", None)
        self.set_scheme(scheme, None)

    @classmethod
    def refuses(cls, module: Any) -> str | None:
        """Why this class cannot stand for a module, or None."""
        return None

    def to_out_in(self, weight: torch.Tensor) -> torch.Tensor:
        """The original module's weight with output channels first, and the other way round."""
        return weight

    def restored(self, dtype: torch.dtype | None = None) -> nn.Module:
        """The original module, with the dequantized weight in `dtype` (by default `high_precision`)."""
        module, dtype = _shell(self.origin), dtype or self.high_precision
        module.weight = nn.Parameter(self.to_out_in(self.dequantized_weight(dtype)).contiguous())
        if "bias" in module._parameters:
            module.bias = self.bias
        return module

    def set_weight(self, weight: torch.Tensor, scale: torch.Tensor) -> None:
        """Take FP8 codes and their float32 scale; parameters are shared, not copied."""
        self.weight, self.weight_scale = (x if isinstance(x, nn.Parameter) else frozen(x) for x in (weight, scale))
        self.record.watch(self.weight)

    def set_scheme(self, scheme: Scheme, input_scale: torch.Tensor | None) -> None:
        """Compute by `scheme` from now on, with a static scale `(1,)` of the input or none, and count calls anew."""
        self.scheme, self.record = scheme, ops.CallRecord()
        self.input_rule: ScaleRule = scheme.input
        if not self.rows_are_tokens:
            self.input_rule = replace(scheme.input, granularity=PerTensor())
        self.input_scale = None if input_scale is None else frozen(input_scale.to(self.weight.device, torch.float32))
        self.record.watch(self.weight)

    def activation_scale(self, x: torch.Tensor) -> torch.Tensor | None:
        """The scale to round `x` with: its own, the calibrated one, or none.

        Raises:
            FP8StateError: `x` is not in high precision (some code cast it to this weight's dtype, without a scale), or
                the weight is no longer in FP8.
        """
        scheme, parameters = self.scheme, self._parameters  # attributes take longer
        if x.dtype not in _HIGH_PRECISION:
            raise FP8StateError(
                f"{self.name}: an FP8 module was given an input in {x.dtype}, but expects high precision; where code "
                "around it cast it to the dtype of the weight, without a scale, put the module on the blocklist"
            )
        weight = parameters["weight"]
        if weight is not None and weight.dtype is not scheme.fmt.dtype:
            raise FP8StateError(
                f"{self.name}: the weight of an FP8 module was replaced by one in {weight.dtype}: expected "
                f"{scheme.fmt.dtype} with its scale; convert the original model again"
            )
        return scheme.dynamic_scale(x, self.input_rule) if scheme.is_dynamic else parameters["input_scale"]

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
        if self.scheme.is_dynamic:
            return "dynamic"
        return "weight_only" if self.input_scale is None else "static"

    def dequantized_weight(self, dtype: torch.dtype) -> torch.Tensor:
        """weight · weight_scale, `[out, in, …]` in `dtype`."""
        return ops.cast_from_fp8(self.weight, self.weight_scale, dtype)

    def scales(self) -> dict[str, torch.Tensor]:
        """The scales that are there, by name."""
        found = {"weight_scale": self.weight_scale, "input_scale": self.input_scale}
        return {name: scale for name, scale in found.items() if scale is not None}

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> FP8Module:
        """Moves go through; casts do not: an FP8 weight cast to another dtype would lose its scale silently."""

        def keep_dtype(tensor: torch.Tensor) -> torch.Tensor:
            applied = fn(tensor)
            keep = is_fp8(tensor.dtype) or any(tensor is scale for scale in (self.weight_scale, self.input_scale))
            if is_fp8(tensor.dtype) and applied.dtype != tensor.dtype:
                self.high_precision = applied.dtype
            return tensor.to(applied.device) if keep and applied.dtype != tensor.dtype else applied

        super()._apply(keep_dtype, recurse)
        self.record.watch(self.weight)
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """Outside of a transformers quantizer, which does it when saving, weights are handed out as they go to disk:
        with a leading dimension of one, so that code that knows nothing of their scales cannot take them for values."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if not self.managed:
            destination[f"{prefix}weight"] = stored_weight(destination[f"{prefix}weight"])

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        """Only FP8 codes with sound scales are taken."""
        errors: list[str] = args[-1]
        weight = state_dict.get(f"{prefix}weight")
        if weight is not None:
            if weight.dtype != self.weight.dtype:
                errors.append(f"{prefix}weight is {weight.dtype}, expected FP8 codes in {self.weight.dtype}")
            if f"{prefix}weight_scale" not in state_dict:
                errors.append(f"{prefix}weight_scale is missing: codes mean nothing without their scale")
            if weight.shape == stored_shape(self.weight.shape):
                state_dict[f"{prefix}weight"] = weight.squeeze(0)
        for name in ("weight_scale", "input_scale"):
            scale = state_dict.get(f"{prefix}{name}")
            if scale is not None and (wrong := unsound(scale)):
                errors.append(f"{prefix}{name} {wrong}")
        if not errors:
            super()._load_from_state_dict(state_dict, prefix, *args)
            self.record.watch(self.weight)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.record.watch(self.weight)  # a copy counts its own calls

    def extra_repr(self) -> str:
        fmt = self.scheme.fmt
        return f"{fmt.name} on {fmt.target}, weight {self.scheme.weight.granularity}, activations {self.activations}"


def stored_weight(weight: torch.Tensor) -> torch.Tensor:
    """Codes as they go to disk: with a leading dimension of one.

    transformers without this plugin tolerates unknown names, dtypes and missing scales with a warning, and would
    compute garbage, but it never loads a weight of a wrong shape.
    """
    return weight.unsqueeze(0)


def stored_shape(shape: torch.Size) -> tuple[int, ...]:
    """The shape on disk of a weight that has `shape` in memory."""
    return (1, *shape)


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
