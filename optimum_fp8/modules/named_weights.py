"""What FP8 modules with several weights have in common: codes and a scale for each, under the names that it has."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from .. import ops
from ..errors import FP8CheckpointError, FP8NotAvailableError
from ..formats import is_fp8, not_finite
from ..ops.fp8_tensor import FP8Tensor
from ..scales import Scheme
from .base import StandsForOriginal, own_attributes, shell_of
from .expert_tensors import misfit
from .weight import FP8Weight, asked_by_mover, frozen, stored_weight


class FP8NamedWeights(StandsForOriginal):
    """A module that holds several matrices in FP8, each with its scale, and some scales of what is rounded.

    It has the attributes, buffers, children and methods of the module that it stands for. A weight `<name>` reads as
    values, a read-only tensor of the original's shape; code that loads, moves and saves parameters finds its codes.

    Args:
        origin: the module in high precision, or on meta.
        names: of its weights.
        scheme: how they are scaled and computed.

    Attributes:
        origin: the module this one stands for, without its parameters.
        weight_names: `<name>` is `[out, in]`, FP8, frozen; `<name>_scale` is float32, `(1,)`, `(out, 1)` or by blocks.
        activation_scales: names of the static scales that there may be, float32 `(1,)`.
        high_precision: the dtype its weights had, or would have been cast to since.
        record: the calls of its operators.
        name: of the module in its model, for messages.
    """

    activation_scales: tuple[str, ...] = ()

    origin: Any
    scheme: Scheme

    def __init__(self, origin: Any, names: Sequence[str], scheme: Scheme):
        super().__init__()
        self.__dict__.update(own_attributes(origin))
        self._buffers, self._modules = dict(origin._buffers), dict(origin._modules)
        self._non_persistent_buffers_set = set(origin._non_persistent_buffers_set)
        self.__dict__ |= {"origin": shell_of(origin), "weight_names": tuple(names)}
        self.high_precision: torch.dtype = origin._parameters[names[0]].dtype
        self.name, self.scheme, self.record = "", scheme, ops.CallRecord()
        # What is in high precision comes first: transformers takes the dtype of a model's first parameter for its own.
        others = {key: each for key, each in origin._parameters.items() if key not in names}
        absent = dict.fromkeys([*names, *(f"{name}_scale" for name in names), *self.activation_scales])
        self._parameters = {**others, **absent}

    # --- the weights ----------------------------------------------------------------------------------------------

    def __getattr__(self, name: str) -> Any:
        if name in self.__dict__.get("weight_names", ()) and self._parameters.get(name) is not None:
            return self._moved(name) if asked_by_mover() else self._values(name)
        return super().__getattr__(name)

    def codes(self, name: str) -> nn.Parameter:
        """A weight as it is held: FP8, `[out, in]`."""
        held: Any = self._parameters[name]
        if held is not None and held.ndim == 3:  # as it is stored, `[1, out, in]`
            held = self._parameters[name] = frozen(held.squeeze(0), like=held)
        return held  # type: ignore[no-any-return]

    def scale(self, name: str) -> nn.Parameter:
        """The scale of a weight."""
        return self._parameters[f"{name}_scale"]  # type: ignore[return-value]

    def dequantized(self, name: str, dtype: torch.dtype, *, counts: bool = False) -> torch.Tensor:
        """The values of a weight, `[out, in]` in `dtype`; `counts`: as a call of this module."""
        return ops.cast_from_fp8(self.codes(name), self.scale(name), dtype, record=self.record if counts else None)

    def _values(self, name: str) -> Any:
        codes = self.codes(name)
        if not is_fp8(codes.dtype):
            return codes
        values = FP8Weight(codes, self.scale(name), self.high_precision)
        if not torch.compiler.is_compiling():
            values.__dict__.update(codes.__dict__)  # what others put on the parameter: "is initialized", say
        return values

    def _moved(self, name: str) -> nn.Parameter:
        """The codes for code that moves them; those that are to be brought (meta) as they are stored."""
        codes = self.codes(name)
        if codes.is_meta:
            codes = self._parameters[name] = frozen(stored_weight(codes), like=codes)
        return codes

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        if name in self.weight_names and isinstance(param, FP8Tensor):  # the values of another one
            self._parameters[f"{name}_scale"] = frozen(param.scale)
            param = frozen(param.codes)
        super().register_parameter(name, param)

    def __delattr__(self, name: str) -> None:
        if name in self.weight_names and not asked_by_mover():
            raise FP8NotAvailableError(
                f"{self.name}.{name}: a weight of an FP8 module cannot be pruned, reparametrized or taken away: do "
                "that to the original model and convert it again, or call optimum_fp8.dequantize(model) first"
            )
        super().__delattr__(name)

    def set_weights(self, weights: Mapping[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Take FP8 codes and their float32 scale by name; parameters are shared, not copied."""
        for name, pair in weights.items():
            codes, scale = (x if isinstance(x, nn.Parameter) else frozen(x) for x in pair)
            self._parameters[name], self._parameters[f"{name}_scale"] = codes, scale
        self.record.watch(*map(self.codes, self.weight_names))

    def expect(self, shapes: Mapping[str, torch.Size], scale_shape: Callable[[torch.Size], tuple[int, ...]]) -> None:
        """Make room for what a checkpoint is about to bring: codes as they are stored, and all scales."""
        empty: dict[str, torch.Tensor] = {}
        for name, shape in shapes.items():
            codes = torch.empty(shape, dtype=self.scheme.fmt.dtype, device="meta")
            empty |= {name: stored_weight(codes), f"{name}_scale": _no_scale(scale_shape(shape))}
        for name in self.activation_scales if self.scheme.is_static else ():
            empty[name] = _no_scale((1,))
        self._parameters |= {name: frozen(tensor) for name, tensor in empty.items()}

    def check_codes(self) -> None:
        """Refuse what a checkpoint brought that is no code of this number format.

        Raises:
            FP8CheckpointError: names the weight.
        """
        for name in self.weight_names:
            codes, dtype = self.codes(name), self.scheme.fmt.dtype
            if codes.dtype != dtype or codes.ndim != 2 or not_finite(codes):
                wrong = "codes that are NaN or Inf" if codes.dtype == dtype else str(codes.dtype)
                raise FP8CheckpointError(
                    f"{self.name}.{name}: found {wrong}, expected codes [1, out, in] in {dtype}: the checkpoint is "
                    "damaged, copy it again"
                )

    def restored(self, dtype: torch.dtype | None = None) -> nn.Module:
        """The original module, with the dequantized weights in `dtype` (by default `high_precision`)."""
        module, dtype = shell_of(self.origin), dtype or self.high_precision
        kept = [name for name in own_attributes(module) if name not in _OURS and name in vars(self)]
        module.__dict__.update({name: vars(self)[name] for name in kept})
        module._buffers, module._modules = self._buffers, self._modules
        for name in module._parameters:
            own = name in self.weight_names
            module._parameters[name] = nn.Parameter(self.dequantized(name, dtype)) if own else self._parameters[name]
        return module  # type: ignore[no-any-return]

    # --- computing ------------------------------------------------------------------------------------------------

    def set_scheme(self, scheme: Scheme, scales: Mapping[str, torch.Tensor]) -> None:
        """Compute by `scheme` from now on, with static scales by name or none, and count calls anew."""
        self.scheme, self.record = scheme, ops.CallRecord()
        for name in self.activation_scales:
            given = scales.get(name)
            device = self.codes(self.weight_names[0]).device
            self._parameters[name] = None if given is None else frozen(given.to(device, torch.float32))
        self.record.watch(*map(self.codes, self.weight_names))

    def pack(self) -> None:
        """Bring weights and scales into the form that the backend in use wants, which changes no value."""
        packing = ops.packing_for(self.scale(self.weight_names[0]).device)
        if packing is None or self.codes(self.weight_names[0]).is_meta:
            return
        for name in self.weight_names:
            codes = self.codes(name)
            codes.data = packing.matrix(codes.data)
            self.record.watch(codes)
        if packing.constants:
            scales = self.scales()
            for name in scales.keys() & {*self.activation_scales}:
                ops.keep_inverse(scales[name])
            for scale in scales.values() if self.scheme.constant_scales else ():
                ops.mark_constant(scale, self.scheme.fmt.hardware_scales)

    # --- as a module ----------------------------------------------------------------------------------------------

    def tensors(self) -> dict[str, torch.Tensor]:
        """All parameters by name, codes as they are held."""
        found = {name: self.codes(name) if name in self.weight_names else x for name, x in self._parameters.items()}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def scales(self) -> dict[str, torch.Tensor]:
        """The scales that are there, by name."""
        names = (*(f"{name}_scale" for name in self.weight_names), *self.activation_scales)
        return {name: scale for name in names if (scale := self._parameters[name]) is not None}

    def reported(self) -> dict[str, torch.Tensor]:
        """The scales by name, and those of all weights together as `weight_scale`."""
        of_weights = [self.scale(name).flatten() for name in self.weight_names]
        return self.scales() | {"weight_scale": torch.cat(of_weights)}

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> FP8NamedWeights:
        """Moves go through; casts do not, as of other FP8 modules."""
        scales = {id(scale) for scale in self.scales().values()}

        def keep_dtype(tensor: torch.Tensor) -> torch.Tensor:
            applied = fn(tensor)
            if is_fp8(tensor.dtype) and applied.dtype != tensor.dtype:
                self.high_precision = applied.dtype
            keep = (is_fp8(tensor.dtype) or id(tensor) in scales) and applied.dtype != tensor.dtype
            return tensor.to(applied.device) if keep else applied

        super()._apply(keep_dtype, recurse)
        self.record.watch(*map(self.codes, self.weight_names))
        self.pack()
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """Codes are handed out as they go to disk, with a leading dimension of one."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in self.weight_names:
            codes = self.codes(name)
            destination[f"{prefix}{name}"] = stored_weight(codes if keep_vars else codes.detach())

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        """Only FP8 codes with sound scales are taken."""
        errors: list[str] = args[-1]
        own, fmt = self.tensors(), self.scheme.fmt
        given = {name: state_dict[f"{prefix}{name}"] for name in own if f"{prefix}{name}" in state_dict}
        ours = {*self.weight_names, *self.scales()}
        wrong = [text for name, x in given.items() if name in ours and (text := misfit(name, x, own[name], fmt))]
        lacking = [name for name in self.weight_names if name in given and f"{name}_scale" not in given]
        wrong += [f"{name}_scale is missing: codes mean nothing without their scale" for name in lacking]
        if wrong:
            errors += [f"{prefix}{text}" for text in wrong]
            return
        for name in self.weight_names:
            if name in given:
                state_dict[f"{prefix}{name}"] = given[name].reshape(own[name].shape)
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.record.watch(*map(self.codes, self.weight_names))
        self.pack()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if all(self._parameters[name] is not None for name in self.weight_names):
            self.record.watch(*map(self.codes, self.weight_names))  # a copy counts its own calls
            self.pack()

    def extra_repr(self) -> str:
        fmt = self.scheme.fmt
        return f"{fmt.name} on {fmt.target}, weights {self.scheme.weight.granularity}, {self.scheme.activations}"


def _no_scale(shape: tuple[int, ...]) -> torch.Tensor:
    """Room for a scale; while transformers loads a model, the default dtype is the model's."""
    return torch.empty(shape, dtype=torch.float32, device="meta")


_OURS = frozenset({"name", "origin", "scheme", "record", "high_precision", "weight_names"})
