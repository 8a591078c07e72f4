"""Mixtures of experts: a token and a prompt, layouts of scales, static and dynamic activations, some of the experts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from ...formats import NumberFormat
from ...ops.arguments import ExpertsCall
from ..case import DTYPE_NAMES, ULPS, Case, Draw, named, scale

_EXPERTS, _CHOSEN, _HIDDEN, _INNER = 8, 2, 64, 96
_DECODE, _PREFILL = 1, 24
# What goes into the second product is rounded to FP8: a value on the edge between two codes goes to either.
_ROUNDED_INTERMEDIATES = 8.0


class _Row(NamedTuple):
    tokens: int = _PREFILL
    weight: str = "per expert"
    activations: str = "static"
    dtype: torch.dtype = torch.bfloat16
    activation: str = "silu"
    first: int = 0  # the number of the first expert that is here
    arithmetic: str = ""  # the target's own


_ROWS = [
    _Row(_DECODE),
    _Row(),
    _Row(dtype=torch.float32),
    _Row(weight="per half"),
    _Row(weight="per channel"),
    _Row(_DECODE, "per channel", "dynamic"),
    _Row(weight="per channel", activations="dynamic"),
    _Row(weight="per channel", activations="weight only"),
    _Row(activation="gelu"),
    _Row(first=4),
    _Row(arithmetic="qdq"),
]


def cases(fmt: NumberFormat) -> Iterator[Case]:
    """Of `experts`."""
    draw = Draw(fmt)
    for row in _ROWS:
        parts = ("decode" if row.tokens == _DECODE else "prefill", f"weight {row.weight}", row.activations)
        some = "some of the experts" if row.first else ""
        name = named(DTYPE_NAMES[row.dtype], *parts, row.activation, some, row.arithmetic)
        exact = row.activations == "weight only"
        yield Case("experts", name, _call(draw, row), ulps=ULPS[row.dtype] if exact else _ROUNDED_INTERMEDIATES)


def _call(draw: Draw, row: _Row) -> ExpertsCall:
    fmt, static = draw.fmt, row.activations == "static"
    chosen = draw.values(row.tokens, _EXPERTS, dtype=torch.float32).topk(_CHOSEN)
    gate_up_scale, down_scale = _weight_scales(draw, row)
    input_scale = scale(2.0**-4) if static else draw.scales(row.tokens, 1, around=0.03)
    return ExpertsCall(
        draw.values(row.tokens, _HIDDEN, dtype=row.dtype),
        chosen.indices,
        chosen.values.softmax(-1),
        draw.codes(_EXPERTS, 2 * _INNER, _HIDDEN),
        draw.codes(_EXPERTS, _HIDDEN, _INNER),
        gate_up_scale,
        down_scale,
        None if row.activations == "weight only" else input_scale,
        torch.full((_EXPERTS, 1, 1), 2.0**-4) if static else None,
        row.activation,
        row.first,
        fmt.full_scale,
        row.arithmetic or ("gaudi" if fmt.is_gaudi else "fused"),
    )


def _weight_scales(draw: Draw, row: _Row) -> tuple[torch.Tensor, torch.Tensor]:
    """Of gate and up, and of down."""
    if row.weight == "per expert":
        return (torch.full((_EXPERTS, 1, 1), 2.0**-8) for _ in range(2))  # type: ignore[return-value]
    if row.weight == "per half":
        return draw.scales(_EXPERTS, 2, 1, around=0.008), draw.scales(_EXPERTS, 1, 1, around=0.008)
    return draw.scales(_EXPERTS, 2 * _INNER, 1, around=0.008), draw.scales(_EXPERTS, _HIDDEN, 1, around=0.008)
