"""Products of many rows as torch's own, of panels of the weight: so many outputs at a time are decoded into one buffer,
and multiplied. `torch_products.py` says where that is better than a variant's own kernel.

In bfloat16, torch multiplies one scale for all with the sums, and adds the bias to them, before it rounds; other scales
are powers of two, and decoded with the codes. In float32, scales are multiplied in where the reference does it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from ..arguments import LinearCall
from ..operands import BLOCK, block_of, group_of, is_along_input
from .casts import Casts
from .library import threads
from .torch_products import dtype_of_panels, from_rows

_PANEL, _THREADS = 1 << 20, 8  # values of a panel for each thread, but for no more threads than that
_INPUT, _ROWS = 1 << 22, 512  # values of the input at a time, but no fewer rows than that
_CPU = torch.device("cpu")
_ONE = torch.ones(1, dtype=torch.float32, device=_CPU)


class TorchPanels:
    """The operator `linear` on torch's products, beside one variant of the library.

    Attributes:
        least_rows: no fewer are taken.
    """

    def __init__(self, casts: Casts, variant: str):
        self.casts, self.from_rows = casts, from_rows(casts.library, variant)
        self.least_rows = min(self.from_rows)

    def run(self, call: LinearCall) -> torch.Tensor | None:
        """The output, or None where the variant's own kernel is better."""
        out, k = call.weight.shape
        rows = call.x.numel() // k
        if rows < self.least_rows or not _may_be_taken(call):
            return None
        if (dtype := dtype_of_panels(call, rows, self.from_rows)) is None:
            return None
        x, scale, step = call.x.reshape(rows, k), call.input_scale, max(_ROWS, _INPUT // k)
        if scale is not None:
            scale = scale.reshape(1) if scale.numel() == 1 else scale.flatten(0, -2)
        y = torch.empty((rows, out), dtype=x.dtype, device=_CPU)
        product = self._in_bfloat16 if dtype == torch.bfloat16 else self._in_float32
        with torch.no_grad():
            for part in (slice(first, first + step) for first in range(0, rows, step)):
                of_rows = scale if scale is None or scale.numel() == 1 else scale[part]
                product(call._replace(x=x[part], input_scale=of_rows), y[part])
            if call.bias is not None and call.arithmetic == "gaudi":
                y.add_(call.bias.to(y.dtype))
        return y.reshape(*call.x.shape[:-1], out)

    def _in_bfloat16(self, call: LinearCall, y: torch.Tensor) -> None:
        x, bias = call.x, None if call.arithmetic == "gaudi" else call.bias
        scales = [scale for scale in (call.weight_scale, call.input_scale) if scale is not None]
        alpha = math.prod((scale for scale in scales if scale.numel() == 1), start=_ONE).item()
        if call.input_scale is not None:
            x = self._rounded(call, torch.bfloat16, scaled=call.input_scale.numel() > 1)
        for part, panel in self._panels(call, torch.bfloat16, scaled=call.weight_scale.numel() > 1):
            into = y[:, part]
            if bias is None:
                torch.addmm(into, x, panel.t(), beta=0, alpha=alpha, out=into)
            else:
                torch.addmm(bias[part], x, panel.t(), alpha=alpha, out=into)

    def _in_float32(self, call: LinearCall, y: torch.Tensor) -> None:
        x, scale, of_rows = call.x.float(), call.weight_scale, _ONE
        bias = None if call.arithmetic == "gaudi" else call.bias
        if call.input_scale is not None:
            by_groups = group_of(call.input_scale, x) > 0
            x = self._rounded(call, torch.float32, scaled=by_groups)
            of_rows = _ONE if by_groups else call.input_scale
        scaled = is_along_input(scale, call.weight)
        for part, panel in self._panels(call, torch.float32, scaled):
            sums = torch.mm(x, panel.t())
            sums *= of_rows if scaled else of_rows * (scale if scale.numel() == 1 else scale[part].t())
            y[:, part] = sums if bias is None else sums.add_(bias[part])

    def _rounded(self, call: LinearCall, dtype: torch.dtype, scaled: bool) -> torch.Tensor:
        """What the input's codes stand for, with their scales or without."""
        assert call.input_scale is not None
        codes = self.casts.cast_to_fp8(call.x, call.input_scale, call.weight.dtype, call.full_scale)
        return self.casts.cast_from_fp8(codes, call.input_scale if scaled else _ONE, dtype)

    def _panels(self, call: LinearCall, dtype: torch.dtype, scaled: bool) -> Iterator[tuple[slice, torch.Tensor]]:
        """Which outputs a panel is of, and the panel: each in the place of the last."""
        (out, k), scale = call.weight.shape, call.weight_scale
        step = max(1, min(threads(), _THREADS) * _PANEL // k // BLOCK) * BLOCK
        buffer, side = torch.empty((min(step, out), k), dtype=dtype, device=_CPU), block_of(scale, call.weight) or 1
        for first in range(0, out, step):
            codes = call.weight[first : first + step]
            panel = buffer[: len(codes)]
            of_codes = scale[first // side : (first + step) // side] if scaled and scale.numel() > 1 else _ONE
            self.casts.decode(codes, of_codes, panel)
            yield slice(first, first + step), panel


def _may_be_taken(call: LinearCall) -> bool:
    """Not in a forked child, in which torch would wait for threads that are gone; nor with a last group that is smaller
    than others, which casts do not take."""
    scales = ((call.weight_scale, call.weight), (call.input_scale, call.x))
    groups = [(group_of(scale, x), x.shape[-1]) for scale, x in scales if scale is not None]
    return threads() == torch.get_num_threads() and all(size % (group or 1) == 0 for group, size in groups)
