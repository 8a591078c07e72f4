"""Convolution on Gaudi: `conv2d_fp8`, which multiplies by the scale of the input and by that of the weight.

It takes one scale of each, and adds a bias before a cast that may follow: so scales of channels are multiplied with its
output in float32, and the bias is always added afterwards.
"""

from __future__ import annotations

from typing import Any

import torch

from ...errors import FP8Error
from ...formats import is_fp8
from .. import reference
from ..arguments import ConvCall
from ..constants import constant_of
from .bridge import operator
from .casts import WIDE, quantize, refuses_full_scale


def refuses(call: ConvCall) -> str | None:
    x, weight, input_scale = call.x, call.weight, call.input_scale
    if input_scale is None:
        return "an input in high precision: conv2d_fp8 multiplies FP8 with FP8"
    if call.arithmetic not in ("fused", "gaudi"):
        return f"arithmetic {call.arithmetic!r}"
    if x.dtype not in WIDE or not is_fp8(weight.dtype):
        return f"inputs in {x.dtype} with weights in {weight.dtype}"
    if call.transposed:
        return "transposed convolutions: conv2d_fp8 has none"
    if weight.ndim > 4:
        return f"{weight.ndim - 2} spatial dimensions: conv2d_fp8 has two"
    try:
        reference.check_conv(call)
    except FP8Error as error:  # which the reference raises
        return str(error)
    return refuses_full_scale(x, weight.dtype, call.full_scale)


def run(call: ConvCall) -> torch.Tensor:
    x, dtype, input_scale = call.x, call.x.dtype, call.input_scale
    assert input_scale is not None  # or it was refused
    codes = quantize(x, input_scale, call.weight.dtype, call.full_scale)
    bias = None if call.bias is None else reference.along_channels(call, call.bias)
    if call.weight_scale.numel() == 1 and call.arithmetic == "gaudi":
        return reference.with_bias(_product(call, codes, input_scale, call.weight_scale, dtype), bias, dtype, "gaudi")
    scale = input_scale * reference.along_channels(call, call.weight_scale)
    product = _product(call, codes, None, None, torch.float32) * scale
    return reference.with_bias(product, bias, dtype, call.arithmetic)


def _product(
    call: ConvCall,
    codes: torch.Tensor,
    input_scale: torch.Tensor | None,
    weight_scale: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """The convolution of codes, times its scales (None: 1), in `dtype`; a one-dimensional one as of height 1."""
    missing, weight, ndim = 4 - call.weight.ndim, call.weight, codes.ndim
    image = codes if ndim == weight.ndim else codes.unsqueeze(0)
    if missing:
        image, weight = image.unsqueeze(2), weight.unsqueeze(2)
    stride, padding, dilation = (
        [value] * missing + list(sizes) for value, sizes in ((1, call.stride), (0, call.padding), (1, call.dilation))
    )
    arguments: dict[str, Any] = {"input": image, "weight": weight, "bias": None, "stride": stride, "padding": padding}
    arguments |= {"dilation": dilation, "groups": call.groups, "out_dtype": dtype}
    s_x, s_w = constant_of(input_scale), constant_of(weight_scale)
    if input_scale is None or weight_scale is None:
        out = operator("conv2d_fp8", "scalar")(**arguments, scale_input=1.0, scale_weight=1.0)
    elif s_x is not None and s_w is not None:
        out = operator("conv2d_fp8", "scalar")(**arguments, scale_input=s_x, scale_weight=s_w)
    else:
        out = operator("conv2d_fp8")(**arguments, scale_input=input_scale, scale_weight=weight_scale)
    out = out.squeeze(2) if missing else out
    return out if ndim == call.weight.ndim else out.squeeze(0)
