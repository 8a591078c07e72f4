"""What all FP8 modules with a weight have in common: their state, and how it survives moves, casts and copies."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from .. import ops
from ..errors import FP8NotAvailableError, FP8StateError
from ..formats import codes_beyond, is_fp8, not_finite
from ..ops.fp8_tensor import FP8Tensor
from ..scales import PerTensor, Scheme, unsound
from .rewriting import rewrite
from .weight import DequantizedWeight, FP8Weight, asked_by_mover, frozen, stored_shape, stored_weight

_HIGH_PRECISION = frozenset({torch.bfloat16, torch.float16, torch.float32, torch.float64})
# What every module has, and what accelerate hangs on one: of a module's instance, not of what it stands for. A bias
# that is None may be an attribute like any other.
_OF_THE_INSTANCE = frozenset({*vars(nn.Module()), "bias", "forward", "_old_forward", "_hf_hook"})


class StandsForOriginal(nn.Module):
    """Has the methods and properties of the class of `origin`, the module that it stands for."""

    def __getattr__(self, name: str) -> Any:
        """What the original's class has: its methods and properties, of this module."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            for found in of_original_class(self, name):
                return found
            raise


class FP8Module(StandsForOriginal):
    """A module that holds an FP8 weight, its scale, and (static activations) the scale of its input.

    It has the attributes, buffers and methods of the module that it stands for.

    Attributes:
        weight: the values, as an FP8Weight of the dtype `high_precision` and the original's shape; code that loads,
            moves and saves parameters finds the codes under this name.
        codes: `[out, in, …]`, FP8, frozen.
        weight_shape: the shape of the codes.
        weight_scale: float32, `(1,)` or `(out, 1, …)`; NaN until it is set.
        input_scale: float32 `(1,)`, or None where activations are not rounded, or rounded dynamically.
        bias: `(out,)` in high precision, or None.
        origin: the module this one stands for, without its parameters.
        high_precision: the dtype its weight had, or would have been cast to since.
        scheme: how it is scaled and computed.
        record: the calls of its operators.
        dynamic_scale: what operators find the scale of an input by, where activations are rounded dynamically, or None.
        name: of the module in its model, for messages.
        derived: whether its weight was computed from what the original holds, and is not stored with it.
        requantized: if its weight was written to since it was made: ‖FP8(values) - values‖ / ‖values‖.
    """

    _is_hf_initialized = True  # codes that a checkpoint lacks are an error: transformers must not make up any
    rows_are_tokens = True  # whether the last dimension of an input is its features
    stores_in_out = False  # whether the original's weight is `[in, out]`
    scale_names: tuple[str, ...] = ("weight_scale", "input_scale")  # the weight's comes first; the others may be None

    weight_scale: nn.Parameter
    input_scale: nn.Parameter | None
    bias: nn.Parameter | None
    scheme: Scheme
    record: ops.CallRecord

    def __new__(cls, *args: Any, **options: Any) -> Any:
        """A layer of torch's class, if it is called as that is: code that makes another layer of the kind of a given
        one calls the type of that, as peft does for convolutions."""
        if args and not isinstance(args[0], (nn.Module, torch.Size)):
            for base in cls.__mro__[: -len(nn.Module.__mro__)]:
                if not issubclass(base, StandsForOriginal):
                    return base(*args, **options)
        return super().__new__(cls)

    def __init__(self, shape: torch.Size, origin: Any, scheme: Scheme):
        nn.Module.__init__(self)  # a class of torch that this one is as well would make a weight of its own
        self.__dict__.update(own_attributes(origin))
        self._buffers, self._modules = dict(origin._buffers), dict(origin._modules)
        self._non_persistent_buffers_set = set(origin._non_persistent_buffers_set)
        self.__dict__["origin"] = shell_of(origin)  # not a submodule
        device = origin.weight.device
        self.weight_shape, self._dimensions = shape, len(shape)
        self.high_precision: torch.dtype = origin.weight.dtype
        self.name, self.derived = "", False
        self.requantized: float | None = None
        scale = torch.full(scheme.weight.granularity.scale_shape(shape), torch.nan, dtype=torch.float32, device=device)
        # The bias comes first: transformers takes the dtype of a model's first parameter for the model's.
        self.register_parameter("bias", getattr(origin, "bias", None))
        self.register_parameter("weight", frozen(torch.empty(shape, dtype=scheme.fmt.dtype, device=device)))
        self.weight_scale = frozen(scale)
        for name in self.scale_names[1:]:
            self.register_parameter(name, None)
        self.set_scheme(scheme, None)

    @classmethod
    def refuses(cls, module: Any) -> str | None:
        """Why this class cannot stand for a module, or None."""
        return None

    def to_out_in(self, weight: torch.Tensor) -> torch.Tensor:
        """The original module's weight with output channels first, and the other way round.

        `self` may be the original as well: nothing but its geometry is asked for.
        """
        return weight

    def restored(self, dtype: torch.dtype | None = None) -> nn.Module:
        """The original module, with the dequantized weight in `dtype` (by default `high_precision`)."""
        module, dtype = shell_of(self.origin), dtype or self.high_precision
        kept = [name for name in own_attributes(module) if name not in _OURS and name in vars(self)]
        module.__dict__.update({name: vars(self)[name] for name in kept})
        module._buffers, module._modules = self._buffers, self._modules
        module.weight = nn.Parameter(self.to_out_in(self.dequantized_weight(dtype)).contiguous())
        if "bias" in module._parameters:
            module.bias = self.bias
        return module

    # --- the weight -----------------------------------------------------------------------------------------------

    @property
    def weight(self) -> torch.Tensor:
        if asked_by_mover():
            return self._moved()
        codes = self.codes
        if codes is None or not is_fp8(codes.dtype):
            return codes
        values = self.to_out_in(FP8Tensor(codes, self.weight_scale, self.high_precision))
        if torch.compiler.is_compiling():
            return FP8Weight(values.codes, values.scale, values.dtype) if isinstance(values, FP8Tensor) else values
        weight: Any
        if isinstance(values, FP8Tensor):
            weight = FP8Weight(values.codes, values.scale, values.dtype)
        else:  # scales by blocks do not follow a transposed weight
            weight = values.as_subclass(DequantizedWeight).of(self)
        weight.__dict__.update(codes.__dict__)  # what others put on the parameter: "is initialized", say
        weight.owner = self
        return weight  # type: ignore[no-any-return]

    @weight.setter
    def weight(self, value: Any) -> None:  # a parameter never comes here: `register_parameter` takes it
        self._refuse_replacing()

    def __delattr__(self, name: str) -> None:
        if name == "weight" and not asked_by_mover():
            self._refuse_replacing()
        super().__delattr__(name)

    def _refuse_replacing(self) -> None:
        raise FP8NotAvailableError(
            f"{self.name}: the weight of an FP8 module cannot be pruned, reparametrized or taken away: do that to the "
            "original model and convert it again, or call optimum_fp8.dequantize(model) first"
        )

    @property
    def codes(self) -> nn.Parameter:
        """The weight as it is stored: FP8, `[out, in, …]`."""
        try:
            weight: Any = self._parameters["weight"]
        except KeyError:
            raise AttributeError("weight") from None
        if weight is not None and (weight.dim() != self._dimensions or isinstance(weight, FP8Tensor)):
            weight = self._parameters["weight"] = self._as_codes(weight)
        return weight

    def _moved(self) -> nn.Parameter:
        """The codes for code that moves them; those that are to be brought (meta) in the form in which they are stored
        and handed out by `state_dict`, and a weight that is quantized on its way in the form that the original has."""
        codes = self.codes
        if codes is None or not codes.is_meta:
            return codes
        if not is_fp8(codes.dtype):
            return frozen(self.to_out_in(codes), like=codes)
        moved = self._parameters["weight"] = frozen(stored_weight(codes), like=codes)
        return moved

    def _as_codes(self, weight: Any) -> Any:
        """Codes `[out, in, …]` of a weight that comes in its stored form, or as the values of an FP8 module."""
        if isinstance(weight, FP8Tensor):
            self.weight_scale = frozen(self.to_out_in(weight.scale))
            return frozen(self.to_out_in(weight.codes))
        is_stored = tuple(weight.shape) == stored_shape(self.weight_shape)
        return frozen(weight.squeeze(0), like=weight) if is_stored else weight

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        super().register_parameter(name, self._as_codes(param) if name == "weight" and param is not None else param)

    def set_weight(self, weight: torch.Tensor, scale: torch.Tensor) -> None:
        """Take FP8 codes and their float32 scale; parameters are shared, not copied."""
        weight, self.weight_scale = (x if isinstance(x, nn.Parameter) else frozen(x) for x in (weight, scale))
        self.register_parameter("weight", weight)
        self.record.watch(self.codes)

    def rewrite(self, values: torch.Tensor) -> None:
        """Quantize `values`, of the original's shape, into the weight: what `weight.data = values` does."""
        rewrite(self, values)

    def pack(self) -> None:
        """Bring weight and scales into the form that the backend in use wants, which changes no value."""
        codes, packing = self.codes, ops.packing_for(self.weight_scale.device)
        if packing is None:
            return
        if codes is not None and codes.ndim == 2 and not codes.is_meta:
            codes.data = packing.matrix(codes.data)
            self.record.watch(codes)
        if packing.constants:
            if self.input_scale is not None:
                ops.keep_inverse(self.input_scale)
            for scale in self.scales().values() if self.scheme.constant_scales else ():
                ops.mark_constant(scale, self.scheme.fmt.hardware_scales)

    def dequantized_weight(self, dtype: torch.dtype) -> torch.Tensor:
        """codes · weight_scale, `[out, in, …]` in `dtype`."""
        return ops.cast_from_fp8(self.codes, self.weight_scale, dtype)

    # --- computing ------------------------------------------------------------------------------------------------

    def set_scheme(self, scheme: Scheme, input_scale: torch.Tensor | None) -> None:
        """Compute by `scheme` from now on, with a static scale `(1,)` of the input or none, and count calls anew."""
        self.scheme, self.record = scheme, ops.CallRecord()
        rule = scheme.input if self.rows_are_tokens else replace(scheme.input, granularity=PerTensor())
        self.dynamic_scale = scheme.dynamic(rule)
        self.input_scale = None if input_scale is None else frozen(input_scale.to(self.codes.device, torch.float32))
        self.record.watch(self.codes)

    def activation_scale(self, x: torch.Tensor) -> torch.Tensor | None:
        """The scale to round `x` with: its own, the calibrated one, or none."""
        return ops.scaled_input(x, self.scale_of(x))[1]

    def scale_of(self, x: torch.Tensor) -> torch.Tensor | ops.DynamicScale | None:
        """What `activation_scale` gives, or what operators find it by.

        Raises:
            FP8StateError: `x` is not in high precision, or the weight is not there, or no longer in FP8.
        """
        scheme, parameters = self.scheme, self._parameters  # attributes take longer
        if x.dtype not in _HIGH_PRECISION:
            if not isinstance(x, torch.Tensor):
                raise FP8NotAvailableError(
                    f"{self.name}: an FP8 module was given a {type(x).__name__}, as torch.fx.symbolic_trace does, and "
                    "expects a tensor: trace with torch.export, or what optimum_fp8.dequantize(model) returns"
                )
            raise FP8StateError(
                f"{self.name}: an FP8 module was given an input in {x.dtype}, but expects high precision; where code "
                "around it cast it without a scale, put the module on the blocklist"
            )
        if (weight := parameters["weight"]) is not None:
            if weight.dtype is not scheme.fmt.dtype or weight.dim() != self._dimensions or weight.requires_grad:
                self._check_codes()
            elif weight.is_meta and not x.is_meta:
                self._refuse_meta()
        return self.dynamic_scale or parameters["input_scale"]

    def _check_codes(self) -> None:
        """Bring a weight of another form into `[out, in, …]`; refuse one that is none in FP8, or is to be trained."""
        codes, expected = self.codes, self.scheme.fmt.dtype
        if codes.dtype is not expected:
            raise FP8StateError(
                f"{self.name}: the weight of an FP8 module was replaced by one in {codes.dtype}: expected {expected} "
                "with its scale; convert the original model again. Under FSDP2 leave out param_dtype of "
                "MixedPrecisionPolicy (accelerate: mixed_precision='no'), which casts what is in FP8 too"
            )
        if codes.requires_grad and torch.is_grad_enabled():
            raise FP8StateError(
                f"{self.name}: the weight of an FP8 module has requires_grad=True, and there is no gradient for FP8 "
                "codes: call requires_grad_(False) on the model and train adapters (peft), or call "
                "optimum_fp8.dequantize(model) to train its weights"
            )
        if codes.is_meta:
            self._refuse_meta()

    def _refuse_meta(self) -> None:
        raise FP8StateError(
            f"{self.name}: the weight of an FP8 module is on the meta device, where it has no values: it is offloaded, "
            "and no hook brings it in, or was never loaded; load the model without offloading, or with a device_map"
        )

    def check_bias(self) -> None:
        """Refuse a bias that does not have one value for each output channel.

        Raises:
            FP8StateError: names the module, and what is expected.
        """
        if self.bias is not None and self.bias.shape != self.weight_shape[:1]:
            raise FP8StateError(
                f"{self.name}: the bias of {type(self.origin).__name__} has shape {tuple(self.bias.shape)}, expected "
                f"{tuple(self.weight_shape[:1])}, one value for each output: give the module a bias that fits, or None"
            )

    @property
    def activations(self) -> str:
        """ "dynamic", "static" or "weight_only"."""
        if self.scheme.is_dynamic:
            return "dynamic"
        return "weight_only" if self.input_scale is None else "static"

    def scales(self) -> dict[str, torch.Tensor]:
        """The scales that are there, by name."""
        found = {name: getattr(self, name) for name in self.scale_names}
        return {name: scale for name, scale in found.items() if scale is not None}

    # --- as a module ----------------------------------------------------------------------------------------------

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> FP8Module:
        """Moves go through; casts do not: an FP8 weight cast to another dtype would lose its scale silently."""

        def keep_dtype(tensor: torch.Tensor) -> torch.Tensor:
            applied = fn(tensor)
            keep = is_fp8(tensor.dtype) or any(tensor is scale for scale in self.scales().values())
            if is_fp8(tensor.dtype) and applied.dtype != tensor.dtype:
                self.high_precision = applied.dtype
            return tensor.to(applied.device) if keep and applied.dtype != tensor.dtype else applied

        super()._apply(keep_dtype, recurse)
        self.record.watch(self.codes)
        self.pack()
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """Codes are handed out as they go to disk, whoever asks: with a leading dimension of one, so that code that
        knows nothing of their scales cannot take them for values."""
        codes = self.codes
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if codes is not None:
            destination[f"{prefix}weight"] = stored_weight(codes if keep_vars else codes.detach())

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        """Only FP8 codes with sound scales are taken."""
        errors: list[str] = args[-1]
        weight, codes = state_dict.get(f"{prefix}weight"), self.codes
        if weight is not None:
            if weight.dtype != codes.dtype:
                errors.append(f"{prefix}weight is {weight.dtype}, expected FP8 codes in {codes.dtype}")
            elif not_finite(weight):
                errors.append(f"{prefix}weight holds codes that are NaN or Inf: it is damaged")
            elif wrong := codes_beyond(weight, self.scheme.fmt):
                errors.append(f"{prefix}weight {wrong}: it was made for another target")
            if f"{prefix}weight_scale" not in state_dict:
                errors.append(f"{prefix}weight_scale is missing: codes mean nothing without their scale")
            if weight.shape == stored_shape(self.weight_shape):
                state_dict[f"{prefix}weight"] = weight.squeeze(0)
        for name in self.scale_names:
            scale = state_dict.get(f"{prefix}{name}")
            if scale is not None and scale.dtype != torch.float32:
                errors.append(f"{prefix}{name} is {scale.dtype}, expected torch.float32")
            if scale is not None and (wrong := unsound(scale)):
                errors.append(f"{prefix}{name} {wrong}")
        if not errors:
            super()._load_from_state_dict(state_dict, prefix, *args)
            self.record.watch(self.codes)
            self.pack()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.record.watch(self.codes)  # a copy counts its own calls
        if self._parameters.get("weight_scale") is not None:
            self.pack()  # what was known of a parameter is not copied

    __repr__ = nn.Module.__repr__  # transformers' Conv1D has one of its own

    def extra_repr(self) -> str:
        fmt = self.scheme.fmt
        return f"{fmt.name} on {fmt.target}, weight {self.scheme.weight.granularity}, activations {self.activations}"


_OURS = frozenset(
    {"name", "origin", "scheme", "record", "high_precision", "dynamic_scale", "weight_shape", "_dimensions", "derived"}
    | {"requantized"}
)


def own_attributes(module: Any) -> dict[str, Any]:
    """The attributes of a module that are its own: geometry, and what users put there."""
    return {name: value for name, value in vars(module).items() if name not in _OF_THE_INSTANCE}


def of_original_class(module: nn.Module, name: str) -> Iterator[Any]:
    """What the class that an FP8 module stands for has under a name, bound to this module, if it has it."""
    if "origin" in module.__dict__ and not name.startswith("__"):
        for cls in type(module.origin).__mro__[: -len(nn.Module.__mro__)]:
            if name in vars(cls):
                found = vars(cls)[name]
                yield found.__get__(module, type(module)) if hasattr(found, "__get__") else found
                return


def shell_of(module: Any) -> Any:
    """A copy of a module without parameters, and without what accelerate hung on it."""
    shell = copy.copy(module)
    shell._parameters = dict.fromkeys(module._parameters)
    for name in ("forward", "_old_forward", "_hf_hook"):
        shell.__dict__.pop(name, None)
    return shell
