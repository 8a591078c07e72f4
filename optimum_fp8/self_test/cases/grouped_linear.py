"""Grouped products: a token and a prompt, layouts of scales, biases, rows whose expert is elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from ...formats import NumberFormat
from ...ops.arguments import GroupedLinearCall
from ..case import DTYPE_NAMES, ULPS, Case, Draw, named, scale

_EXPERTS, _OUT, _IN = 4, 96, 160
_DECODE, _PREFILL = 2, 40
_WEIGHT_SCALES = {
    "per expert": (_EXPERTS, 1, 1),
    "per half": (_EXPERTS, 2, 1),
    "per channel": (_EXPERTS, _OUT, 1),
    "by blocks": (_EXPERTS, 1, 2),
}


class _Row(NamedTuple):
    rows: int = _PREFILL
    weight: str = "per channel"
    activations: str = "static"
    dtype: torch.dtype = torch.bfloat16
    bias: bool = False
    elsewhere: bool = False  # some rows are of an expert that is not here
    arithmetic: str = ""  # the target's own


_ROWS = [
    _Row(_DECODE),
    _Row(_DECODE, activations="dynamic"),
    _Row(),
    _Row(weight="per expert", activations="static per expert"),
    _Row(weight="per half", dtype=torch.float32),
    _Row(activations="dynamic", bias=True, elsewhere=True),
    _Row(weight="by blocks", activations="weight only"),
    _Row(dtype=torch.float16, activations="weight only", bias=True),
    _Row(bias=True, arithmetic="qdq"),
]


def cases(fmt: NumberFormat) -> Iterator[Case]:
    """Of `grouped_linear`."""
    draw = Draw(fmt)
    for row in _ROWS:
        parts = ("decode" if row.rows == _DECODE else "prefill", f"weight {row.weight}", row.activations)
        more = ("bias" if row.bias else "", "some of the experts" if row.elsewhere else "", row.arithmetic)
        yield Case("grouped_linear", named(DTYPE_NAMES[row.dtype], *parts, *more), _call(draw, row), _ulps(row))


def _ulps(row: _Row) -> float:
    return ULPS[row.dtype] * (2 if row.bias or row.arithmetic == "qdq" else 1)


def _call(draw: Draw, row: _Row) -> GroupedLinearCall:
    fmt = draw.fmt
    input_scale = {
        "static": lambda: scale(2.0**-4),
        "static per expert": lambda: draw.scales(_EXPERTS, 1, 1, around=0.03),
        "dynamic": lambda: draw.scales(row.rows, 1, around=0.03),
        "weight only": lambda: None,
    }[row.activations]()
    return GroupedLinearCall(
        draw.values(row.rows, _IN, dtype=row.dtype),
        torch.arange(row.rows) * 7 % (_EXPERTS + row.elsewhere),
        draw.codes(_EXPERTS, _OUT, _IN),
        draw.scales(*_WEIGHT_SCALES[row.weight], around=0.008),
        input_scale,
        draw.values(_EXPERTS, _OUT, dtype=row.dtype) if row.bias else None,
        fmt.full_scale,
        row.arithmetic or ("gaudi" if fmt.is_gaudi else "fused"),
    )
