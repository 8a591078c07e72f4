"""Products of rows with the weights of their experts on the native library."""

from __future__ import annotations

from struct import Struct

import torch
import torch.nn.functional as F

from ...errors import FP8Error
from ..arguments import GroupedLinearCall
from ..operands import group_of, refuses_format
from ..reference_grouped import check_grouped, is_by_halves, linear_of
from .casts import Casts, qdq, refuses_qdq
from .library import FORMATS, TYPES, check, threads
from .prepared import weight_groups

_ARGUMENTS = Struct("=26qd4q")  # fp8cpu_grouped_args


class GroupedLinear:
    """The operator `grouped_linear` on one variant of the library."""

    def __init__(self, casts: Casts):
        self.casts = casts

    def refuses(self, call: GroupedLinearCall) -> str | None:
        x, _, weight, weight_scale, input_scale, bias, full_scale, arithmetic = call
        if x.dtype not in TYPES or weight.dtype not in FORMATS:
            return f"inputs in {x.dtype} with weights in {weight.dtype}"
        if not weight.is_contiguous() or 0 in weight.shape:
            return f"weights of {tuple(weight.shape)}, strides {weight.stride()}"
        if bias is not None and bias.dtype not in TYPES:
            return f"a bias in {bias.dtype}"
        for name, scale in (("weight", weight_scale), ("input", input_scale)):
            if scale is not None and scale.dtype != torch.float32:
                return f"{name} scales in {scale.dtype}"
        try:
            check_grouped(call)
        except FP8Error as error:  # which the reference raises
            return str(error)
        if input_scale is not None and (reason := refuses_format(weight.dtype, full_scale)):
            return reason
        if arithmetic != "qdq":
            return None
        some = torch.arange(min(2, x.shape[0]))  # of no rows, or one, scales may be read as others than they are
        return refuses_qdq(self.casts, linear_of(call, 0, some))

    def run(self, call: GroupedLinearCall) -> torch.Tensor:
        if call.arithmetic == "qdq":
            return self._qdq(call)
        # The copies that are made here must live until the call returns.
        x, experts = call.x.contiguous(), call.experts.to(torch.int64).contiguous()
        scale, bias = call.weight_scale.contiguous(), None if call.bias is None else call.bias.contiguous()
        input_scale = None if call.input_scale is None else call.input_scale.contiguous()
        (rows, k), (count, out, _) = x.shape, call.weight.shape
        halves = is_by_halves(call)
        group, group_rows = (0, 0) if halves else weight_groups(scale, call.weight)
        y = x.new_empty((rows, out))
        packed = _ARGUMENTS.pack(
            *(self.casts.variant, threads(), rows, x.data_ptr(), TYPES[x.dtype], k),
            0 if input_scale is None else input_scale.data_ptr(),
            input_scale is not None and input_scale.ndim == 2,
            0 if input_scale is None or input_scale.ndim != 2 else group_of(input_scale, x),
            0,  # no scales by x's own ranges
            *(y.data_ptr(), TYPES[x.dtype], out, 0, out, k, call.weight.data_ptr(), FORMATS[call.weight.dtype]),
            scale.data_ptr(),
            scale.shape[1] == out and not group,
            out // 2 if halves else 0,
            group,
            group_rows,
            *((0, 0) if bias is None else (bias.data_ptr(), TYPES[bias.dtype])),
            call.arithmetic == "gaudi",
            call.full_scale,
            *(count, experts.data_ptr(), scale.numel() // count),
            input_scale is not None and input_scale.ndim == 3,
        )
        check(self.casts.library.grouped(packed), "grouped_linear")
        return y

    def _qdq(self, call: GroupedLinearCall) -> torch.Tensor:
        y = call.x.new_zeros((call.x.shape[0], call.weight.shape[1]))
        for expert in call.experts.unique().tolist():
            if 0 <= expert < call.weight.shape[0]:
                rows = (call.experts == expert).nonzero().squeeze(1)
                y[rows] = qdq(self.casts, F.linear, linear_of(call, expert, rows))
        return y
