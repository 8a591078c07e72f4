"""Layouts of scales, and what operators take: the rules that the reference and the kernels of every backend share.

A scale is `(1,)`; or it broadcasts to its tensor (one a channel, a token, a head); or it has one value for each block
of 128 × 128 of the last two dimensions, `(…, ⌈out/128⌉, ⌈in/128⌉)`; or one for each group of 128 or 32 values along the
last dimension, `(…, out, ⌈in/g⌉)`. Blocks and groups at the end may be smaller. Which of these a scale is follows from
its shape alone: shapes that could be read in two ways mean the same in both.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..errors import FP8ConfigError, FP8OperandError, FP8ScaleError
from ..formats import FP8_DTYPES

HIGH_PRECISION = frozenset({torch.float32, torch.bfloat16, torch.float16})  # what fast kernels take beside FP8
BLOCK = 128  # side of the blocks that share a scale
GROUPS = (128, 32)  # values along the last dimension that share a scale
GAUDI_EXPERTS = 64  # that Gaudi's operator takes at a time: as of bridge 1.20, by vLLM's extension for it
BIN_SHIFT = 19  # bits of a float32 that a histogram does not look at: 8 of the exponent and 4 of the mantissa are left
BINS = 1 << (31 - BIN_SHIFT)
_LARGEST = {dtype: torch.finfo(dtype).max for dtype in FP8_DTYPES.values()}


def parts(size: int, part: int) -> int:
    """⌈size / part⌉: so many blocks or groups, the last of which may be smaller."""
    return -(-size // part)


def group_shape(shape: Sequence[int], group: int) -> tuple[int, ...]:
    """The shape of ranges and scales of a tensor for the operators' `group`.

    Raises:
        FP8ConfigError: a group below -1.
    """
    if group == 0:
        return (1,)
    if group < -1:
        raise FP8ConfigError(f"group={group}: expected 0 (the whole tensor), -1 (a row), or so many values of a row")
    return (*shape[:-1], parts(shape[-1], group) if group > 0 and shape else 1)


def broadcasts(scale: torch.Tensor, x: torch.Tensor) -> bool:
    """Whether `scale` broadcasts to `x`, and to no more."""
    return scale.ndim <= x.ndim and all(
        size in (1, full) for size, full in zip(reversed(scale.shape), reversed(x.shape), strict=False)
    )


def is_by_rows(scale: torch.Tensor, x: torch.Tensor) -> bool:
    """Whether `scale` has `x`'s leading dimensions, then ones: one scale for what lies in one piece."""
    if scale.ndim != x.ndim:
        return False
    rows = next((dim for dim in range(x.ndim) if scale.shape[dim] != x.shape[dim]), x.ndim)
    return all(size == 1 for size in scale.shape[rows:])


def block_of(scale: torch.Tensor, x: torch.Tensor) -> int:
    """The side of the blocks of `x` that share a scale; 0 where `scale` is not by blocks."""
    if scale.numel() == 1 or x.ndim < 2 or scale.ndim != x.ndim or broadcasts(scale, x):
        return 0
    blocks = (*x.shape[:-2], parts(x.shape[-2], BLOCK), parts(x.shape[-1], BLOCK))
    return BLOCK if tuple(scale.shape) == blocks else 0


def group_of(scale: torch.Tensor, x: torch.Tensor) -> int:
    """How many values along the last dimension of `x` share a scale; 0 where `scale` is not by groups."""
    if scale.numel() == 1 or scale.ndim != x.ndim or scale.shape[:-1] != x.shape[:-1] or broadcasts(scale, x):
        return 0
    return next((group for group in GROUPS if scale.shape[-1] == parts(x.shape[-1], group)), 0)


def broadcast_scale(scale: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """`scale` so that it broadcasts to `x`, and to no more: those of blocks and groups are repeated over their values.

    Raises:
        FP8ScaleError: it has none of the shapes that fit.
    """
    if scale.numel() == 1:
        return scale.reshape([1] * x.ndim)
    if broadcasts(scale, x):
        return scale
    if block := block_of(scale, x):
        rows = scale.repeat_interleave(block, -2)[..., : x.shape[-2], :]
        return rows.repeat_interleave(block, -1)[..., : x.shape[-1]]
    if group := group_of(scale, x):
        return scale.repeat_interleave(group, -1)[..., : x.shape[-1]]
    raise FP8ScaleError(
        f"a scale of shape {tuple(scale.shape)} for a tensor of shape {tuple(x.shape)}: expected {_layouts(x)}"
    )


def check_weight_scale(scale: torch.Tensor, weight: torch.Tensor) -> None:
    """Refuse a scale that does not fit the weight `[out, in]` of a linear layer.

    Raises:
        FP8ScaleError: names what was found and expected.
    """
    if scale.numel() != 1 and not is_per_channel(scale, weight) and not is_along_input(scale, weight):
        raise FP8ScaleError(
            f"a scale of shape {tuple(scale.shape)} does not fit a weight of shape {tuple(weight.shape)}: expected "
            f"{_layouts(weight)}"
        )


def is_per_channel(scale: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether a weight's scale is `(out, 1, …)`."""
    return scale.ndim == weight.ndim and scale.numel() == scale.shape[0] == weight.shape[0]


def is_along_input(scale: torch.Tensor, x: torch.Tensor) -> bool:
    """Whether a scale changes along what a product sums over: by blocks or by groups."""
    return bool(block_of(scale, x) or group_of(scale, x))


def _layouts(x: torch.Tensor) -> str:
    """The shapes of scales that fit `x`, in words."""
    if x.ndim < 2:
        return "(1,), or one that broadcasts to it"
    *leading, out, size = x.shape
    blocks = (*leading, parts(out, BLOCK), parts(size, BLOCK))
    groups = " or ".join(f"{(*leading, out, parts(size, group))}" for group in GROUPS)
    return f"(1,), ({', '.join(map(str, (*leading, out)))}, 1), by blocks of {BLOCK} {blocks}, or by groups {groups}"


def in_out_swapped(weight: torch.Tensor, groups: int) -> torch.Tensor:
    """A transposed convolution's weight `[out, in / groups, k…]` as torch stores it, `[in, out / groups, k…]`, and the
    other way round; a view where there is one group."""
    return weight.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)


def channels_last_of(weight: torch.Tensor) -> torch.memory_format | None:
    """The memory format of a weight whose channels lie side by side, which outputs follow; None of any other."""
    form = {4: torch.channels_last, 5: torch.channels_last_3d}.get(weight.ndim)
    if form is None or weight.is_contiguous() or not weight.is_contiguous(memory_format=form):
        return None
    return form


def refuse_absent(op: str, names: Sequence[str], arguments: Sequence[Any]) -> None:
    """Refuse a call in which the values of some tensors are not there (device "meta") and those of others are: its
    result would be what happens to stand in memory.

    Raises:
        FP8OperandError: names the tensors.
    """
    tensors = {name: value for name, value in zip(names, arguments, strict=True) if isinstance(value, torch.Tensor)}
    absent = [name for name, tensor in tensors.items() if tensor.device.type == "meta"]
    if absent and len(absent) < len(tensors):
        there = ", ".join(name for name in tensors if name not in absent)
        raise FP8OperandError(
            f"{op}: {', '.join(absent)} on the device meta, which has no values, and {there} with values: expected all "
            "or none; load the weights, or call an offloaded module with the hooks that bring its weights"
        )


def refuses_format(dtype: torch.dtype, full_scale: float) -> str | None:
    """Why codes cannot be made: of no FP8 format, or saturating at what it cannot hold."""
    return None if 0 < full_scale <= _LARGEST.get(dtype, 0) else f"casts to {dtype} that saturate at {full_scale}"


def refuses_scales(
    x: torch.Tensor, weight_scale: torch.Tensor, input_scale: torch.Tensor | None, *, by_groups: bool = False
) -> str | None:
    """Why a kernel cannot take the scales: not in float32, or the input's is neither one for all, nor one a row, nor
    (for kernels that scale within a row) by groups."""
    if weight_scale.dtype != torch.float32:
        return f"weight scales in {weight_scale.dtype}"
    return None if input_scale is None else refuses_input_scale(x, input_scale, by_groups=by_groups)


def refuses_input_scale(x: torch.Tensor, input_scale: torch.Tensor, *, by_groups: bool = False) -> str | None:
    """As `refuses_scales`, of the input's."""
    if input_scale.dtype != torch.float32:
        return f"input scales in {input_scale.dtype}"
    if input_scale.numel() == 1 or input_scale.shape == (*x.shape[:-1], 1) or (by_groups and group_of(input_scale, x)):
        return None
    return f"input scales of {tuple(input_scale.shape)} for an input of {tuple(x.shape)}"
