"""Convolution with an FP8 weight: schema, fake kernel and the function to call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from . import reference
from .arguments import ConvCall
from .declare import call, declare
from .dynamic import DynamicScale
from .records import CallRecord


def conv(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    input_scale: torch.Tensor | DynamicScale | None,
    bias: torch.Tensor | None,
    *,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool = False,
    output_padding: Sequence[int] | None = None,
    groups: int = 1,
    full_scale: float,
    arithmetic: str = "fused",
    record: CallRecord | None = None,
) -> torch.Tensor:
    """Convolution over 1 to 3 spatial dimensions, transposed or not, with the arithmetic of `linear`.

    Args:
        x: `[N, C, …]` or `[C, …]`, bfloat16, float16 or float32.
        weight: FP8, `[out, C / groups, k…]`, of a transposed convolution too (torch stores that as
            `[C, out / groups, k…]`).
        weight_scale: float32, `(1,)` or `(out, 1, …)`, one for each output channel.
        input_scale: float32 `(1,)`, None (weight-only), or a `DynamicScale`.
        bias: `(out,)` or None.
        stride, padding, dilation: one value for each spatial dimension.
        transposed: whether it is the transposed convolution.
        output_padding: of a transposed convolution, one value for each spatial dimension; None: zeros.
        groups: of channels.
        full_scale: the value activations saturate at.
        arithmetic: one of `ARITHMETICS`.
        record: counts the call for the module that makes it.

    Returns:
        `[N, out, …]` (or `[out, …]`) in `x`'s dtype.

    Raises:
        FP8OperandError: `x`, `weight` and `bias` do not fit one another.
        FP8ScaleError: a scale does not fit what it belongs to.
        FP8ConfigError: an unknown arithmetic, or a full scale that codes do not reach.
    """
    output_padding = [0] * len(stride) if output_padding is None else list(output_padding)
    geometry = (list(stride), list(padding), list(dilation), transposed, output_padding, groups)
    scale: Any = input_scale  # `call` finds it where it is a rule
    arguments = ConvCall(x, weight, weight_scale, scale, bias, *geometry, full_scale, arithmetic)
    return call("conv", arguments, record)


def _fake(call: ConvCall) -> torch.Tensor:
    return reference.convolve(call, call.x, call.weight.to(call.x.dtype), None)


declare(
    "conv",
    "(Tensor x, Tensor weight, Tensor weight_scale, Tensor? input_scale, Tensor? bias, int[] stride, int[] padding, "
    "int[] dilation, bool transposed, int[] output_padding, int groups, float full_scale, str arithmetic) -> Tensor",
    ConvCall,
    _fake,
    reference.conv,
    attributed_by=("weight",),
    gradient=("x", "bias"),
)
