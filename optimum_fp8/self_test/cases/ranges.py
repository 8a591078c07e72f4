"""Ranges, histograms and scales that follow from a tensor's own range."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ...formats import NumberFormat
from ...ops.arguments import DynamicScaleCall, HistogramCall, MaxabsCall
from ..case import DTYPE_NAMES, Case, Draw, named

_GROUPS = {"per tensor": 0, "per row": -1, "by groups of 128": 128, "by groups of 32": 32}


def cases(fmt: NumberFormat) -> Iterator[Case]:
    """Of `maxabs`, `histogram` and `dynamic_scale`; the first two are the same for all formats."""
    draw = Draw(fmt)
    for dtype, dtype_name in DTYPE_NAMES.items():
        x = draw.values(24, 300, dtype=dtype, spread=5.0)
        if fmt.name == "E4M3":
            yield Case("maxabs", named(dtype_name, "per tensor"), MaxabsCall(x, 0))
            yield Case("histogram", dtype_name, HistogramCall(x))
        yield _scale(fmt, x, "per tensor", "hardware")
    x = draw.values(24, 300, spread=5.0)
    for layout, group in _GROUPS.items():
        if fmt.name == "E4M3" and group:
            yield Case("maxabs", named("bf16", layout), MaxabsCall(x, group))
        yield _scale(fmt, x, layout, "pow2")
        yield _scale(fmt, x, layout, "identity")
    not_finite = torch.cat([x, torch.full((1, 300), float("inf")).to(x.dtype)])
    yield _scale(fmt, not_finite, "per tensor", "hardware", "with infinities")


def _scale(fmt: NumberFormat, x: torch.Tensor, layout: str, rounding: str, more: str = "") -> Case:
    call = DynamicScaleCall(x, _GROUPS[layout], fmt.full_scale, rounding, fmt.name, fmt.target, torch.bfloat16)
    return Case("dynamic_scale", named(DTYPE_NAMES[x.dtype], layout, rounding, more), call)
