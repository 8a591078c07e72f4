"""A tensor stored in FP8 that acts as its high-precision tensor for any code that does not know it.

Cached keys and values, and the weights of FP8 modules, are handed to models in this form. Code that knows FP8 takes
`codes` and `scale`; any other operator sees the high-precision values, made when it is called and gone afterwards.
Views (transposed, sliced, expanded, …) stay FP8 and share memory with what they are views of.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch

from ..errors import FP8NotAvailableError
from .casts import cast_from_fp8
from .embedding import embedding
from .records import record_of

_aten = torch.ops.aten
_VIEWS = {
    _aten._reshape_alias.default,
    _aten._unsafe_view.default,
    _aten.alias.default,
    _aten.detach.default,
    _aten.expand.default,
    _aten.permute.default,
    _aten.select.int,
    _aten.slice.Tensor,
    _aten.split.Tensor,
    _aten.split_with_sizes.default,
    _aten.squeeze.default,
    _aten.squeeze.dim,
    _aten.squeeze.dims,
    _aten.t.default,
    _aten.transpose.int,
    _aten.unbind.int,
    _aten.unsqueeze.default,
    _aten.view.default,
}


class FP8Tensor(torch.Tensor):
    """`codes · scale`, as a tensor of the dtype `dtype`; read-only, without gradient.

    Attributes:
        codes: FP8, any shape; `[batch, heads, length, head size]` from a cache, `[out, in, …]` from a module.
        scale: float32, as `cast_from_fp8` takes it: `(1,)`, `(heads, 1, 1)`, `[batch, heads, length, 1]` or `(out, 1)`.
    """

    codes: torch.Tensor
    scale: torch.Tensor

    # Operators are caught below autograd; what a function is composed of is then seen piece by piece.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, codes: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> FP8Tensor:
        return torch.Tensor._make_wrapper_subclass(
            cls,
            codes.shape,
            strides=codes.stride(),
            storage_offset=codes.storage_offset(),
            dtype=dtype,
            device=codes.device,
        )

    def __init__(self, codes: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype):
        self.codes, self.scale = codes, scale

    def dequantize(self) -> torch.Tensor:
        """The values as an ordinary tensor of this one's shape and dtype, in memory of its own."""
        if self.codes.numel() == 0:
            return torch.empty(self.codes.shape, dtype=self.dtype, device=self.codes.device)
        return cast_from_fp8(self.codes, self.scale, self.dtype)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in _VIEWS and isinstance(args[0], FP8Tensor):
            views = _view(func, args[0], args[1:], kwargs)
            if views is not None:
                return views
        if func is _aten.embedding.default and (table := args[0]).codes.ndim == 2 and _is_of_rows(table.scale, table):
            return embedding(args[1], table.codes, table.scale, table.dtype, record=record_of([table.codes]))
        for position, name in _written(func):
            argument = args[position] if position < len(args) else kwargs.get(name)
            several = argument if isinstance(argument, (list, tuple)) else [argument]
            if any(isinstance(each, FP8Tensor) for each in several):
                raise FP8NotAvailableError(
                    f"{func} would write into a tensor that is stored in FP8 (of a cache, or a module's weight), which "
                    "is read-only: write into a clone() of it, or call optimum_fp8.dequantize(model) before"
                )
        return func(*_ordinary(args), **{name: _ordinary(argument) for name, argument in kwargs.items()})

    # What needs memory that holds the values gets a copy, or is refused: torch would crash on what is not there.

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.dequantize().__reduce_ex__(protocol)

    def __dlpack__(self, **options: Any) -> Any:
        return self.dequantize().__dlpack__(**options)

    def share_memory_(self) -> Any:
        raise FP8NotAvailableError(
            "a tensor that is stored in FP8 has no memory that holds its values: share a clone() of it"
        )

    def tolist(self) -> Any:
        return self.dequantize().tolist()

    def numpy(self, **options: Any) -> Any:  # type: ignore[override]
        return self.dequantize().numpy(**options)

    def __repr__(self, **options: Any) -> str:  # type: ignore[override]
        return f"FP8Tensor({self.dequantize()!r}, codes={self.codes.dtype}, scale={tuple(self.scale.shape)})"

    def __deepcopy__(self, memo: dict[int, Any]) -> FP8Tensor:
        return memo.setdefault(id(self), FP8Tensor(self.codes.clone(), self.scale.clone(), self.dtype))

    def __tensor_flatten__(self) -> tuple[list[str], torch.dtype]:
        return ["codes", "scale"], self.dtype

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Any], dtype: torch.dtype, size: Any, stride: Any) -> FP8Tensor:
        return FP8Tensor(inner["codes"], inner["scale"], dtype)


def _is_of_rows(scale: torch.Tensor, table: torch.Tensor) -> bool:
    return scale.numel() == 1 or scale.shape == (table.shape[0], 1)


def _ordinary(argument: Any) -> Any:
    """An operator's argument with ordinary tensors in place of FP8 ones."""
    if isinstance(argument, FP8Tensor):
        return argument.dequantize()
    return type(argument)(map(_ordinary, argument)) if isinstance(argument, (list, tuple)) else argument


@cache
def _written(func: Any) -> tuple[tuple[int, str], ...]:
    """Position and name of the arguments that an operator writes into."""
    arguments = enumerate(func._schema.arguments)
    return tuple((i, arg.name) for i, arg in arguments if arg.alias_info is not None and arg.alias_info.is_write)


def _view(func: Callable[..., Any], tensor: FP8Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The view, or the tuple of views, as FP8; None where the scale cannot follow."""
    codes, dtype = func(tensor.codes, *args, **kwargs), tensor.dtype
    many = isinstance(codes, (tuple, list))
    if tensor.scale.numel() == 1:
        scale = tensor.scale if tensor.scale.shape == (1,) else tensor.scale.reshape(1)  # a known constant stays one
        return type(codes)(FP8Tensor(c, scale, dtype) for c in codes) if many else FP8Tensor(codes, scale, dtype)
    try:
        scales = func(_expanded(tensor.scale, tensor.codes.shape), *args, **kwargs)
    except RuntimeError:  # dimensions of different scales are merged: no strides can tell
        return None
    if not many:
        return FP8Tensor(codes, _compact(scales), dtype)
    return type(codes)(FP8Tensor(c, _compact(s), dtype) for c, s in zip(codes, scales, strict=True))


def _expanded(scale: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """`scale` in the shape of the codes; real memory up to its last dimension that is not one, strides of 0 behind."""
    full = scale.reshape((1,) * (len(shape) - scale.ndim) + tuple(scale.shape))
    last = max(i for i, size in enumerate(full.shape) if size != 1)
    return full.expand(*shape[: last + 1], *full.shape[last + 1 :]).contiguous().expand(shape)


def _compact(scale: torch.Tensor) -> torch.Tensor:
    """An expanded scale with ones for the dimensions along which it does not change."""
    for dim, stride in enumerate(scale.stride()):
        if stride == 0 and scale.shape[dim] > 1:
            scale = scale.narrow(dim, 0, 1)
    return scale.reshape(1) if scale.numel() == 1 else scale
