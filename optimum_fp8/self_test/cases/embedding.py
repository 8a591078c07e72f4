"""Rows of tables, with one scale and with one a row."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ...formats import NumberFormat
from ...ops.arguments import EmbeddingCall
from ..case import DTYPE_NAMES, Case, Draw, named, scale

_ROWS, _SIZE = 60, 48


def cases(fmt: NumberFormat) -> Iterator[Case]:
    """Of `embedding`."""
    draw = Draw(fmt)
    places = (torch.arange(2 * 7, device="cpu").reshape(2, 7) * 13) % _ROWS
    for dtype in DTYPE_NAMES:
        for layout, scales in (("per tensor", scale(2.0**-8)), ("per row", draw.scales(_ROWS, 1, around=0.004))):
            call = EmbeddingCall(places, draw.codes(_ROWS, _SIZE), scales, dtype)
            yield Case("embedding", named(DTYPE_NAMES[dtype], layout), call)
