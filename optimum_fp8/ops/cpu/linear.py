"""Products with FP8 weights on the native library."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .. import dispatch
from ..arguments import LinearCall
from ..operands import is_along_input, refuses_format, refuses_scales
from ..reference import ARITHMETICS
from .casts import Casts, qdq, refuses_qdq
from .library import FORMATS, TYPES
from .prepared import PackedLinear, PreparedLinear
from .torch_panels import TorchPanels


class Linear:
    """The operator `linear` on one variant of the library."""

    def __init__(self, casts: Casts, variant: str):
        self.casts, self.panels = casts, TorchPanels(casts, variant)

    def refuses(self, call: LinearCall) -> str | None:
        x, weight, weight_scale, input_scale, bias, full_scale, arithmetic = call
        if x.dtype not in TYPES or weight.dtype not in FORMATS:
            return f"inputs in {x.dtype} with weights in {weight.dtype}"
        out, k = weight.shape if weight.ndim == 2 else (0, 0)
        if not k or x.ndim == 0 or x.shape[-1] != k or not weight.is_contiguous():
            return f"an input of {tuple(x.shape)} with weights of {tuple(weight.shape)}, strides {weight.stride()}"
        if bias is not None and (bias.dtype not in TYPES or bias.shape != (out,)):
            return f"a bias of {tuple(bias.shape)} in {bias.dtype}"
        if arithmetic not in ARITHMETICS:
            return "unknown arithmetic"  # the reference says which are known
        if input_scale is not None and (reason := refuses_format(weight.dtype, full_scale)):
            return reason
        reason = _refuses_weight_scale(weight, weight_scale)
        reason = reason or refuses_scales(x, weight_scale, input_scale, by_groups=True)
        return reason or (refuses_qdq(self.casts, call) if arithmetic == "qdq" else None)

    def run(self, call: LinearCall) -> torch.Tensor:
        if call.arithmetic == "qdq":
            return qdq(self.casts, F.linear, call)
        if (y := self.panels.run(call)) is not None:
            return y
        # The copies that `contiguous` may make must live until the call returns.
        scale, bias = call.weight_scale.contiguous(), None if call.bias is None else call.bias.contiguous()
        return self._packed(call._replace(weight_scale=scale, bias=bias))(call.x, call.input_scale)

    def prepare(self, call: LinearCall) -> PreparedLinear | None:
        stay = (call.weight_scale, call.bias)
        if call.arithmetic == "qdq" or not all(tensor is None or tensor.is_contiguous() for tensor in stay):
            return None
        finds_scales = self.casts.backend == dispatch.preferred("dynamic_scale", "cpu")
        return PreparedLinear(self._packed(call), call, finds_scales, self.panels.least_rows)

    def _packed(self, call: LinearCall) -> PackedLinear:
        return PackedLinear(self.casts.library, self.casts.variant, call)


def _refuses_weight_scale(weight: torch.Tensor, scale: torch.Tensor) -> str | None:
    if scale.numel() == 1 or scale.shape == (weight.shape[0], 1) or is_along_input(scale, weight):
        return None
    return f"weight scales of {tuple(scale.shape)} for a weight of {tuple(weight.shape)}"
