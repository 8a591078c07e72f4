"""The reference of `grouped_linear`: of each expert its rows, through the reference of `linear`."""

from __future__ import annotations

import torch

from ..errors import FP8ConfigError, FP8OperandError, FP8ScaleError, nearest
from ..formats import is_fp8
from .arguments import GroupedLinearCall, LinearCall
from .operands import BLOCK, GROUPS, group_of, parts
from .reference import ARITHMETICS, linear


def grouped_linear(call: GroupedLinearCall) -> torch.Tensor:
    check_grouped(call)
    y = call.x.new_zeros((call.x.shape[0], call.weight.shape[1]))
    for expert in range(call.weight.shape[0]):
        rows = (call.experts == expert).nonzero().squeeze(1)
        if rows.numel():
            y[rows] = linear(linear_of(call, expert, rows))
    return y


def linear_of(call: GroupedLinearCall, expert: int, rows: torch.Tensor) -> LinearCall:
    """The call of `linear` that some rows of one expert are."""
    return LinearCall(
        call.x[rows],
        call.weight[expert],
        weight_scale_of(call, expert),
        _input_scale_of(call, expert, rows),
        None if call.bias is None else call.bias[expert],
        call.full_scale,
        call.arithmetic,
    )


def weight_scale_of(call: GroupedLinearCall, expert: int) -> torch.Tensor:
    """An expert's weight scale as `linear` takes it: that of a half is repeated over its rows."""
    scale = call.weight_scale[expert]
    return scale.repeat_interleave(call.weight.shape[1] // 2, 0) if is_by_halves(call) else scale


def is_by_halves(call: GroupedLinearCall) -> bool:
    """Whether the scales are those of the upper and the lower half of each weight's rows."""
    return tuple(call.weight_scale.shape) == (call.weight.shape[0], 2, 1) and call.weight.shape[1] % 2 == 0


def _input_scale_of(call: GroupedLinearCall, expert: int, rows: torch.Tensor) -> torch.Tensor | None:
    scale = call.input_scale
    if scale is None or scale.ndim == 1:
        return scale
    return scale[expert].reshape(1) if scale.ndim == 3 else scale[rows]


def check_grouped(call: GroupedLinearCall) -> None:
    """Refuse operands that do not belong together.

    Raises:
        FP8OperandError: names what was found and expected.
        FP8ScaleError: a scale does not fit what it belongs to.
        FP8ConfigError: an unknown arithmetic.
    """
    if call.arithmetic not in ARITHMETICS:
        raise FP8ConfigError(f"arithmetic={call.arithmetic!r} is unknown: {nearest(call.arithmetic, ARITHMETICS)}")
    _check_operands(call)
    _check_weight_scale(call)
    _check_input_scale(call)


def _check_operands(call: GroupedLinearCall) -> None:
    x, experts, weight, bias = call.x, call.experts, call.weight, call.bias
    if is_fp8(x.dtype) or not x.is_floating_point() or not is_fp8(weight.dtype):
        raise FP8OperandError(
            f"grouped_linear: an input in {x.dtype} and weights in {weight.dtype}: expected an input in high precision "
            "and weights in FP8 (codes that are held as bytes are seen as FP8 by .view(dtype))"
        )
    if x.ndim != 2 or weight.ndim != 3 or x.shape[1] != weight.shape[2]:
        raise FP8OperandError(
            f"grouped_linear: an input of shape {tuple(x.shape)} and weights of shape {tuple(weight.shape)}: expected "
            "[rows, in] and [experts, out, in]; weights stored as [experts, in, out] have to be transposed"
        )
    if experts.is_floating_point() or experts.is_complex() or experts.dtype == torch.bool:
        raise FP8OperandError(f"grouped_linear: numbers of experts in {experts.dtype}: expected integers")
    if experts.shape != x.shape[:1]:
        raise FP8OperandError(
            f"grouped_linear: numbers of experts of shape {tuple(experts.shape)} for an input of {x.shape[0]} rows: "
            f"expected ({x.shape[0]},), one for each row"
        )
    if bias is not None and bias.shape != weight.shape[:2]:
        raise FP8OperandError(
            f"grouped_linear: a bias of shape {tuple(bias.shape)} for weights of shape {tuple(weight.shape)}: expected "
            f"{tuple(weight.shape[:2])}, one value for each output of each expert"
        )


def _check_weight_scale(call: GroupedLinearCall) -> None:
    (count, out, size), shape = call.weight.shape, tuple(call.weight_scale.shape)
    blocks = (count, parts(out, BLOCK), parts(size, BLOCK))
    groups = [(count, out, parts(size, group)) for group in GROUPS]
    if shape not in ((count, 1, 1), (count, out, 1), blocks, *groups) and not is_by_halves(call):
        halves = f", for each half {(count, 2, 1)}" if out % 2 == 0 else ""
        raise FP8ScaleError(
            f"grouped_linear: weight scales of shape {shape} for weights of shape {tuple(call.weight.shape)}: expected "
            f"one for each expert {(count, 1, 1)}{halves}, for each output {(count, out, 1)}, by blocks of {BLOCK} "
            f"{blocks}, or for each {' or '.join(map(str, GROUPS))} values of an output {' or '.join(map(str, groups))}"
        )


def _check_input_scale(call: GroupedLinearCall) -> None:
    scale, count, rows = call.input_scale, call.weight.shape[0], call.x.shape[0]
    if scale is not None and tuple(scale.shape) not in ((1,), (count, 1, 1), (rows, 1)) and not group_of(scale, call.x):
        raise FP8ScaleError(
            f"grouped_linear: input scales of shape {tuple(scale.shape)} for an input of shape {tuple(call.x.shape)}: "
            f"expected (1,), one for each expert {(count, 1, 1)} or each row {(rows, 1)}, or one for each 128 or 32 "
            "values of a row"
        )
