"""Products whose weight, scale and bias are packed once, and used again while those stay what and where they are."""

from __future__ import annotations

from struct import Struct

import torch

from ..arguments import LinearCall
from ..dynamic import DynamicScale
from ..operands import BLOCK, GROUPS, block_of, group_of, refuses_input_scale
from .library import FORMATS, TYPES, Library, check, threads
from .ranges import scale_of_range

OF_A_CALL, THAT_STAYS = Struct("=14q"), Struct("=12qd")  # fp8cpu_linear_args


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
        self.output: _Output = None, 0, (), ()

    def __call__(self, x: torch.Tensor, input_scale: torch.Tensor | None, own: ByRange | None = None) -> torch.Tensor:
        """`[…, out]`, with `x` `[…, k]`, which has scales by its `own` ranges, if these are given."""
        x = x.contiguous()  # a copy, if it is one, lives until the call returns; so does that of the scale
        for_shape, rows, shape, strides = self.output
        if x.shape != for_shape:
            _, rows, shape, strides = self.output = self._output_of(x.shape)
        y, dtype = x.new_empty_strided(shape, strides), TYPES[x.dtype]  # takes half the time of torch.empty
        pointer = step = group = table = 0
        if own is not None:
            table, step, group = own
        elif input_scale is not None:
            input_scale = input_scale.contiguous()
            pointer, step = input_scale.data_ptr(), input_scale.numel() != 1
            group = group_of(input_scale, x) if step else 0
        of_input = (self.variant, threads(), rows, x.data_ptr(), dtype, self.k, pointer, step, group, table)
        of_call = OF_A_CALL.pack(*of_input, y.data_ptr(), dtype, self.out, 0)
        check(self.library.linear(of_call + self.stays, 1), "linear")
        return y

    def _output_of(self, shape: torch.Size) -> _Output:
        """How many rows an input of a shape has, and the output's shape and strides."""
        output = torch.empty((*shape[:-1], self.out), device="meta")
        return shape, shape[:-1].numel(), output.shape, output.stride()


class PreparedLinear:
    """Calls that are like an earlier one: with its weight, scale and bias, none of which it keeps alive; and of fewer
    rows than `rows_elsewhere`, from which on another way may be faster.

    Where `finds_scales`, it takes those whose input scale is a rule.
    """

    def __init__(self, packed: PackedLinear, call: LinearCall, finds_scales: bool, rows_elsewhere: int):
        self.by_range: tuple[DynamicScale | None, ByRange | None] = None, None
        self.finds_scales, self.values_elsewhere = finds_scales, rows_elsewhere * packed.k
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
        if isinstance(input_scale, DynamicScale):
            rule, own = self.by_range
            if rule != input_scale:
                own = self._learn(input_scale)
            return self.packed(x, None, own) if own is not None and x.numel() else None
        if input_scale is not None and refuses_input_scale(x, input_scale, by_groups=True):
            return None
        return self.packed(x, input_scale)

    def _learn(self, rule: DynamicScale) -> ByRange | None:
        """What the library finds scales by as the rule does; None if it cannot."""
        own, group = None, -1 if rule.group == self.packed.k else rule.group
        fits = group in (0, -1) or (group in GROUPS and self.packed.k % group == 0)
        if fits and self.finds_scales and rule.hp_dtype is torch.bfloat16:
            table = scale_of_range(rule.group == 0, *rule[1:5])  # is kept for good
            own = table.data_ptr(), int(group != 0), max(group, 0)
        self.by_range = rule, own
        return own


_Output = tuple[torch.Size | None, int, tuple[int, ...], tuple[int, ...]]
ByRange = tuple[int, int, int]
"""The address of a table of scales by ranges; 1 where each row has one; how many values of a row have one, or 0."""
_Identity = tuple[type, int, torch.Size, torch.dtype]


def _identity(tensor: torch.Tensor) -> _Identity:
    return type(tensor), tensor.data_ptr(), tensor.shape, tensor.dtype


def _is(known: _Identity, tensor: torch.Tensor) -> bool:
    """Whether it is a tensor in the same place, of the same shape and dtype: all that was packed. The object may be
    another; a reference to it, be it a weak one, would keep `torch.utils.swap_tensors` from its work."""
    if type(tensor) is not known[0] or tensor.data_ptr() != known[1] or tensor.shape != known[2]:
        return False
    return tensor.dtype is known[3] and tensor.is_contiguous()
