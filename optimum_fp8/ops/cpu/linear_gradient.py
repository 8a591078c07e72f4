"""The gradient of products with FP8 weights with respect to their input, on the native library."""

from __future__ import annotations

from struct import Struct

import torch

from ..arguments import LinearInputGradientCall
from ..operands import is_along_input
from .library import FORMATS, TYPES, Library, check, threads
from .prepared import weight_groups

_ARGUMENTS = Struct("=17qd")  # fp8cpu_linear_gradient_args


class LinearInputGradient:
    """The operator `linear_input_gradient` on one variant of the library."""

    def __init__(self, library: Library, variant: int):
        self.library, self.variant = library, variant

    def refuses(self, call: LinearInputGradientCall) -> str | None:
        grad, weight, scale, x, input_scale = call[:5]
        if grad.dtype not in TYPES or weight.dtype not in FORMATS:
            return f"gradients in {grad.dtype} with weights in {weight.dtype}"
        out, size = weight.shape if weight.ndim == 2 else (0, 0)
        if not out or grad.ndim == 0 or grad.shape[-1] != out or not weight.is_contiguous():
            return f"a gradient of {tuple(grad.shape)} with weights of {tuple(weight.shape)}, strides {weight.stride()}"
        if scale.dtype != torch.float32:
            return f"weight scales in {scale.dtype}"
        if scale.numel() != 1 and scale.shape != (out, 1) and not is_along_input(scale, weight):
            return f"weight scales of {tuple(scale.shape)} for a weight of {tuple(weight.shape)}"
        if x is None or input_scale is None:
            return None
        if x.dtype not in TYPES or x.shape != (*grad.shape[:-1], size):
            return f"an input of {tuple(x.shape)} in {x.dtype} for a gradient of {tuple(grad.shape)}"
        if input_scale.numel() != 1 or input_scale.dtype != torch.float32:
            return f"input scales of {tuple(input_scale.shape)} in {input_scale.dtype}"
        return None

    def run(self, call: LinearInputGradientCall) -> torch.Tensor:
        weight, group = call.weight, weight_groups(call.weight_scale, call.weight)
        out, size = weight.shape
        # The copies that `contiguous` may make must live until the call returns.
        grad, scale = call.grad.contiguous(), call.weight_scale.contiguous()
        x = None if call.x is None or call.input_scale is None else call.x.contiguous()
        y = torch.empty((*grad.shape[:-1], size), dtype=grad.dtype, device=grad.device)
        arguments = _ARGUMENTS.pack(
            self.variant,
            threads(),
            grad.numel() // out,
            size,
            out,
            grad.data_ptr(),
            TYPES[grad.dtype],
            weight.data_ptr(),
            FORMATS[weight.dtype],
            scale.data_ptr(),
            scale.numel() > 1 and not group[0],
            *group,
            0 if x is None else x.data_ptr(),
            0 if x is None else TYPES[x.dtype],
            0 if x is None or call.input_scale is None else call.input_scale.data_ptr(),
            y.data_ptr(),
            call.full_scale,
        )
        check(self.library.linear_gradient(arguments), "linear_input_gradient")
        return y
