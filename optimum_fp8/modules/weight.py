"""What `.weight` of an FP8 module is: for code that computes, the values; for code that moves parameters, the codes."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn

from ..errors import FP8NotAvailableError
from ..ops.fp8_tensor import FP8Tensor

# Code that asks for a parameter by its name in order to load, move, shard or save it, and puts back what it was given.
_MOVERS = (
    "accelerate.",
    "torch.distributed.",
    "torch.nn.modules.module",  # get_parameter
    "torch.nn.utils._named_member_accessor",  # functional_call
    "transformers.core_model_loading",
    "transformers.integrations.accelerate",
)


class FP8Weight(FP8Tensor):
    """An FP8 module's weight as the high-precision parameter that it stands for.

    What is assigned to its `data`, added to it or subtracted from it (`weight.data += x`) is quantized again by the
    module it is of, if it has an `owner`; no operator writes into it.

    It counts as a parameter, and functions that look for tensors with an interpretation of their own find it to be one:
    torch's fused transformer layers then call the modules, instead of multiplying by their weights.
    """

    @classmethod
    def __torch_function__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    def __init__(self, codes: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype):
        super().__init__(codes, scale, dtype)
        self._is_param = True

    @property
    def data(self) -> torch.Tensor:  # type: ignore[override]
        """The same values, without being a parameter."""
        if (owner := self.__dict__.get("owner")) is None:
            return FP8Tensor(self.codes, self.scale, self.dtype)
        return FP8Values(self.codes, self.scale, self.dtype).of(owner)  # type: ignore[no-any-return]

    @data.setter
    def data(self, value: torch.Tensor) -> None:
        _write(self.__dict__.get("owner"), value)

    def detach(self) -> FP8Weight:  # type: ignore[override]
        return FP8Weight(self.codes, self.scale, self.dtype)  # a parameter can be made of it

    def data_ptr(self) -> int:
        return self.codes.data_ptr()

    def __deepcopy__(self, memo: dict[int, Any]) -> FP8Weight:
        return memo.setdefault(id(self), FP8Weight(self.codes.clone(), self.scale.clone(), self.dtype))

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Any], dtype: torch.dtype, size: Any, stride: Any) -> FP8Weight:
        return FP8Weight(inner["codes"], inner["scale"], dtype)


class _WrittenByAddition:
    """`+=` and `-=` write to the weight of a module, the `owner`; `made_of` tells the codes that the values are of."""

    owner: Any
    made_of: int

    def of(self, owner: Any) -> Any:
        self.owner, self.made_of = owner, owner.codes.data_ptr()
        return self

    def __iadd__(self, other: Any) -> Any:
        return self._changed(other, torch.Tensor.add_)

    def __isub__(self, other: Any) -> Any:
        return self._changed(other, torch.Tensor.sub_)

    def _changed(self, other: Any, change: Any) -> Any:
        self.owner.rewrite(change(self.clone(), other))  # type: ignore[attr-defined]
        return self.owner.weight.data


class FP8Values(_WrittenByAddition, FP8Tensor):
    """What `data` of a weight is that can be written to."""


class DequantizedWeight(_WrittenByAddition, torch.Tensor):
    """Values of a weight whose scales do not follow its shape; written to as an FP8Weight is."""

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        if name.endswith("_") and not name.endswith("__") and args and isinstance(args[0], DequantizedWeight):
            raise FP8NotAvailableError(f"{name} would write into a copy of the weight of {args[0].owner.name}: {_WAYS}")
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @property
    def data(self) -> torch.Tensor:  # type: ignore[override]
        return self

    @data.setter
    def data(self, value: torch.Tensor) -> None:
        _write(self.owner, value)


_WAYS = "change the original model and convert it again, or call optimum_fp8.dequantize(model) first"


def _write(owner: Any, value: torch.Tensor) -> None:
    if owner is None:
        raise FP8NotAvailableError(f"the weight of an FP8 module cannot be written to: {_WAYS}")
    if isinstance(value, _WrittenByAddition) and value.owner is owner and value.made_of == owner.codes.data_ptr():
        return  # what `+=` has written already
    owner.rewrite(value.clone() if isinstance(value, (FP8Tensor, DequantizedWeight)) else value)


def asked_by_mover() -> bool:
    """Whether what calls the caller is code that moves parameters, and not code that computes.

    Both read `module.weight`, so nothing but who asks can tell what is wanted: accelerate gives back a parameter in the
    dtype that it finds, and a model casts its activations to the dtype that it finds.
    """
    if torch.compiler.is_compiling():  # what is compiled computes
        return False
    caller = sys._getframe(2).f_globals.get("__name__", "")
    return isinstance(caller, str) and caller.startswith(_MOVERS)


def frozen(tensor: torch.Tensor, like: torch.Tensor | None = None) -> nn.Parameter:
    """`tensor` as a parameter without gradient (FP8 has no norm kernels, and a scale must not drift), with the
    attributes that others put on the parameter `like`."""
    parameter = nn.Parameter(tensor.detach(), requires_grad=False)
    if like is not None:
        parameter.__dict__.update(like.__dict__)
    return parameter


def stored_weight(weight: torch.Tensor) -> torch.Tensor:
    """Codes as they go to disk: with a leading dimension of one.

    transformers without this plugin tolerates unknown names, dtypes and missing scales with a warning, and would
    compute garbage, but it never loads a weight of a wrong shape.
    """
    return weight.unsqueeze(0)


def stored_shape(shape: torch.Size) -> tuple[int, ...]:
    """The shape on disk of a weight that has `shape` in memory."""
    return (1, *shape)
