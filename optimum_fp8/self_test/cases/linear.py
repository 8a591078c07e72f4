"""Linear layers: a token and a prompt, layouts of scales, static and dynamic activations, weights only."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from ...formats import NumberFormat
from ...ops.arguments import LinearCall
from ..case import DTYPE_NAMES, ULPS, Case, Draw, named, scale

_IN, _OUT = 320, 192
_DECODE, _PREFILL = 1, 40
_WEIGHT_SCALES = {
    "hardware": (1,),
    "per tensor": (1,),
    "per channel": (_OUT, 1),
    "by blocks": (2, 3),
    "by groups of 128": (_OUT, 3),
    "by groups of 32": (_OUT, 10),
}
_ACTIVATIONS = {
    "static": (1,),
    "static hardware": (1,),
    "per token": (1, None, 1),
    "by groups": (1, None, 3),
    "by groups of 32": (1, None, 10),
}


class _Row(NamedTuple):
    tokens: int
    weight: str
    activation: str
    dtype: torch.dtype = torch.bfloat16
    bias: bool = False
    arithmetic: str = ""  # the target's own


_ROWS = [
    _Row(_DECODE, "hardware", "static hardware"),
    _Row(_PREFILL, "hardware", "static hardware"),
    _Row(_PREFILL, "hardware", "static hardware", bias=True),
    _Row(_PREFILL, "hardware", "static hardware", torch.float16),
    _Row(_PREFILL, "hardware", "static hardware", torch.float32),
    _Row(_DECODE, "per tensor", "static", bias=True),
    _Row(_DECODE, "per channel", "static", bias=True),
    _Row(_PREFILL, "per channel", "static"),
    _Row(_DECODE, "per channel", "per token"),
    _Row(_PREFILL, "per channel", "per token", bias=True),
    _Row(_PREFILL, "per tensor", "per token"),
    _Row(_DECODE, "by blocks", "by groups"),
    _Row(_PREFILL, "by blocks", "by groups"),
    _Row(_PREFILL, "by blocks", "static"),
    _Row(_PREFILL, "by groups of 128", "weight only"),
    _Row(_DECODE, "by groups of 32", "by groups of 32"),
    _Row(_PREFILL, "by groups of 32", "by groups of 32"),
    _Row(_PREFILL, "by groups of 32", "weight only"),
    _Row(_DECODE, "hardware", "weight only"),
    _Row(_PREFILL, "hardware", "weight only", bias=True),
    _Row(_PREFILL, "per channel", "weight only"),
    _Row(_PREFILL, "per channel", "weight only", torch.float32),
    _Row(_PREFILL, "by blocks", "weight only"),
    _Row(_PREFILL, "per tensor", "static", bias=True, arithmetic="qdq"),
]


def cases(fmt: NumberFormat) -> Iterator[Case]:
    """Of `linear`."""
    draw = Draw(fmt)
    for row in _ROWS:
        arithmetic = row.arithmetic or ("gaudi" if fmt.is_gaudi else "fused")
        call = LinearCall(
            draw.values(1, row.tokens, _IN, dtype=row.dtype),
            draw.codes(_OUT, _IN),
            scale(2.0**-8) if row.weight == "hardware" else draw.scales(*_WEIGHT_SCALES[row.weight], around=0.004),
            _input_scale(draw, row),
            draw.values(_OUT, dtype=row.dtype, spread=0.5) if row.bias else None,
            fmt.full_scale,
            arithmetic,
        )
        twice = row.bias and arithmetic == "gaudi"  # the sum with the bias is rounded once more
        yield Case("linear", _name(row), call, ulps=ULPS[row.dtype] * (2 if twice else 1))


def _input_scale(draw: Draw, row: _Row) -> torch.Tensor | None:
    if row.activation == "weight only":
        return None
    if row.activation == "static hardware":
        return scale(2.0**-4)
    shape = [row.tokens if size is None else size for size in _ACTIVATIONS[row.activation]]
    return draw.scales(*shape, around=0.03)


def _name(row: _Row) -> str:
    shape = "decode" if row.tokens == _DECODE else "prefill"
    options = ("bias" if row.bias else "", row.arithmetic)
    return named(DTYPE_NAMES[row.dtype], shape, f"weight {row.weight}", row.activation, *options)
