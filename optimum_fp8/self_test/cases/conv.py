"""Convolutions: over one to three dimensions, their geometry, channels, weights only."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from ...formats import NumberFormat
from ...ops.arguments import ConvCall
from ..case import DTYPE_NAMES, ULPS, Case, Draw, named, scale

_SIZES = (12, 10, 9)  # of the input along its spatial dimensions
_CHANNELS, _OUT = 8, 16


class _Row(NamedTuple):
    name: str
    dimensions: int = 2
    weight: str = "per tensor"
    activation: str = "static"
    dtype: torch.dtype = torch.bfloat16
    bias: bool = False
    stride: int = 1
    padding: int = 0
    dilation: int = 1
    groups: int = 1
    transposed: bool = False
    arithmetic: str = ""  # the target's own


_ROWS = [
    _Row("plain"),
    _Row("plain", bias=True, padding=1),
    _Row("plain", dtype=torch.float32),
    _Row("stride 2, padding 1, dilation 2", stride=2, padding=1, dilation=2),
    _Row("groups", groups=4),
    _Row("depthwise", groups=_CHANNELS, bias=True),
    _Row("plain", weight="per channel", bias=True),
    _Row("groups", weight="per channel", groups=4),
    _Row("plain", activation="weight only"),
    _Row("plain", weight="per channel", activation="weight only"),
    _Row("plain", dimensions=1, padding=1),
    _Row("plain", dimensions=3, bias=True),
    _Row("transposed, stride 2", transposed=True, stride=2),
    _Row("transposed", transposed=True, weight="per channel", bias=True),
    _Row("plain", bias=True, arithmetic="qdq"),
]


def cases(fmt: NumberFormat) -> Iterator[Case]:
    """Of `conv`."""
    draw = Draw(fmt)
    for row in _ROWS:
        arithmetic = row.arithmetic or ("gaudi" if fmt.is_gaudi else "fused")
        call = _call(draw, row, arithmetic)
        twice = row.bias and arithmetic == "gaudi"  # the sum with the bias is rounded once more
        options = (row.weight, row.activation, "bias" if row.bias else "", row.arithmetic)
        name = named(DTYPE_NAMES[row.dtype], f"{row.dimensions}d", row.name, *options)
        yield Case("conv", name, call, ulps=ULPS[row.dtype] * (2 if twice else 1))


def _call(draw: Draw, row: _Row, arithmetic: str) -> ConvCall:
    ones, each = (1,) * row.dimensions, (3,) * row.dimensions
    return ConvCall(
        draw.values(2, _CHANNELS, *_SIZES[: row.dimensions], dtype=row.dtype),
        draw.codes(_OUT, _CHANNELS // row.groups, *each),
        draw.scales(_OUT, 1, *ones, around=0.004) if row.weight == "per channel" else scale(2.0**-8),
        None if row.activation == "weight only" else scale(2.0**-4),
        draw.values(_OUT, dtype=row.dtype, spread=0.5) if row.bias else None,
        [row.stride] * row.dimensions,
        [row.padding] * row.dimensions,
        [row.dilation] * row.dimensions,
        row.transposed,
        [0] * row.dimensions,
        row.groups,
        draw.fmt.full_scale,
        arithmetic,
    )
