"""Products whose weight, scale and bias are packed once, and used again while those stay what and where they are."""

from __future__ import annotations

from struct import Struct

import torch

from ..arguments import LinearCall
from ..operands import BLOCK, block_of, group_of, refuses_input_scale
from .library import FORMATS, TYPES, Library, check, threads

OF_A_CALL, THAT_STAYS = Struct("=13q"), Struct("=12qd")  # fp8cpu_linear_args
_CPU = torch.device("cpu")


def weight_groups(scale: torch.Tensor, weight: torch.Tensor) -> tuple[int, int]:
    """How many values along the input share a scale, and with those of how many outputs; zeros where scales do not
    change along the input."""
    if block_of(scale, weight):
        return BLOCK, BLOCK
    group = group_of(scale, weight)
    return group, int(group > 0)


def _pack(call: LinearCall) -> bytes:
    """What stays from call to call."""
    weight, scale, bias = call.weight, call.weight_scale, call.bias
    group, group_rows = weight_groups(scale, weight)
    return THAT_STAYS.pack(
        *weight.shape,
        weight.data_ptr(),
        FORMATS[weight.dtype],
        scale.data_ptr(),
        scale.numel() > 1 and not group,
        0,  # no halves
        group,
        group_rows,
        0 if bias is None else bias.data_ptr(),
        0 if bias is None else TYPES[bias.dtype],
        call.arithmetic == "gaudi",
        call.full_scale,
    )


class PackedLinear:
    """A weight, its scale and bias as the library takes them; it holds none of them, so its owner must."""

    def __init__(self, library: Library, variant: int, call: LinearCall):
        self.library, self.variant, self.stays = library, variant, _pack(call)
        self.out, self.k = call.weight.shape

    def __call__(self, x: torch.Tensor, input_scale: torch.Tensor | None) -> torch.Tensor:
        """`[…, out]`, with `x` `[…, k]`."""
        x = x.contiguous()  # a copy, if it is one, lives until the call returns; so does that of the scale
        dtype, out, k = x.dtype, self.out, self.k
        y = torch.empty((*x.shape[:-1], out), dtype=dtype, device=_CPU)
        pointer = step = group = 0
        if input_scale is not None:
            input_scale = input_scale.contiguous()
            pointer, step, group = input_scale.data_ptr(), input_scale.numel() != 1, group_of(input_scale, x)
        of_call = (self.variant, threads(), x.numel() // k, x.data_ptr(), TYPES[dtype], k, pointer, step, group)
        check(
            self.library.linear(OF_A_CALL.pack(*of_call, y.data_ptr(), TYPES[dtype], out, 0) + self.stays, 1), "linear"
        )
        return y


class PreparedLinear:
    """Calls that are like an earlier one: with its weight, scale and bias, none of which it keeps alive; and of fewer
    rows than `rows_elsewhere`, from which on another way may be faster."""

    def __init__(self, packed: PackedLinear, call: LinearCall, rows_elsewhere: int):
        self.values_elsewhere = rows_elsewhere * packed.k
        self.packed, self.dtype, self.options = packed, call.x.dtype, call[5:]
        self.weight, self.weight_scale = _identity(call.weight), _identity(call.weight_scale)
        self.bias = None if call.bias is None else _identity(call.bias)

    def __call__(self, call: LinearCall) -> torch.Tensor | None:
        """The output, or None where the call is not like it."""
        x, weight, weight_scale, input_scale, bias = call[:5]
        if call[5:] != self.options or x.dtype is not self.dtype or not x.is_cpu or x.shape[-1] != self.packed.k:
            return None
        if x.numel() >= self.values_elsewhere:
            return None
        if not _is(self.weight, weight) or not _is(self.weight_scale, weight_scale):
            return None
        if bias is not self.bias if bias is None or self.bias is None else not _is(self.bias, bias):
            return None
        if input_scale is not None and refuses_input_scale(x, input_scale, by_groups=True):
            return None
        return self.packed(x, input_scale)


_Identity = tuple[type, int, torch.Size, torch.dtype]


def _identity(tensor: torch.Tensor) -> _Identity:
    return type(tensor), tensor.data_ptr(), tensor.shape, tensor.dtype


def _is(known: _Identity, tensor: torch.Tensor) -> bool:
    """Whether it is a tensor in the same place, of the same shape and dtype: all that was packed. The object may be
    another; a reference to it, be it a weak one, would keep `torch.utils.swap_tensors` from its work."""
    if type(tensor) is not known[0] or tensor.data_ptr() != known[1] or tensor.shape != known[2]:
        return False
    return tensor.dtype is known[3] and tensor.is_contiguous()
