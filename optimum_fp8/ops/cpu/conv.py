"""Convolution on a CPU: the casts are native, the product of exact FP8 values in float32 is torch's own convolution."""

from __future__ import annotations

import torch

from ...errors import FP8Error
from .. import reference
from ..arguments import ConvCall
from ..operands import refuses_format, refuses_scales
from ..reference import ARITHMETICS
from .casts import Casts, qdq
from .library import FORMATS, TYPES


class Conv:
    """The operator `conv` on one variant of the library."""

    def __init__(self, casts: Casts):
        self.casts = casts

    def refuses(self, call: ConvCall) -> str | None:
        x, weight, weight_scale, input_scale = call[:4]
        if x.dtype not in TYPES or weight.dtype not in FORMATS:
            return f"inputs in {x.dtype} with weights in {weight.dtype}"
        if call.arithmetic not in ARITHMETICS:
            return "unknown arithmetic"  # the reference says which are known
        if input_scale is not None and (reason := refuses_format(weight.dtype, call.full_scale)):
            return reason
        try:
            reference.check_conv(call)
        except FP8Error as error:  # which the reference raises
            return str(error)
        return refuses_scales(x, weight_scale, input_scale)

    def run(self, call: ConvCall) -> torch.Tensor:
        def convolve(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
            return reference.convolve(call, x, weight, bias)

        x, weight, bias, input_scale = call.x, call.weight, call.bias, call.input_scale
        if call.arithmetic == "qdq":
            return qdq(self.casts, convolve, call)
        one = torch.ones(1, dtype=torch.float32, device=x.device)
        values, scale = x.float(), reference.along_channels(call, call.weight_scale)
        if input_scale is not None:
            codes = self.casts.cast_to_fp8(x, input_scale, weight.dtype, call.full_scale)
            values, scale = self.casts.cast_from_fp8(codes, one, torch.float32), input_scale * scale
        product = convolve(values, self.casts.cast_from_fp8(weight, one, torch.float32)).mul_(scale)
        bias = None if bias is None else reference.along_channels(call, bias)
        return reference.with_bias(product, bias, x.dtype, call.arithmetic)
