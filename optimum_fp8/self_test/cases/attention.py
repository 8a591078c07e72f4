"""Attention, its probabilities, and products of two activations: a token and a prompt, masks, heads, codes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from ...formats import NumberFormat
from ...ops.arguments import AttentionCall, AttentionWeightsCall, MatmulCall, SoftmaxCall
from ...ops.reference_attention import FUSED
from ..case import DTYPE_NAMES, ULPS, Case, Draw, named, scale

_BATCH, _DIM = 2, 64
# A probability that is on the edge between two codes goes to either: that moves an output by more than its rounding.
_ROUNDED_PROBABILITIES = 8.0


class _Row(NamedTuple):
    queries: int = 1
    keys: int = 48
    heads: tuple[int, int] = (4, 2)  # of queries, and of keys and values
    dtype: torch.dtype = torch.bfloat16
    scales: str = "per tensor"  # of keys and values
    cached: bool = False  # keys and values are FP8 codes
    rounds_probabilities: bool = True
    rounds_output: bool = False
    mask: str = ""
    sinks: bool = False
    softcap: float = 0.0
    dataflow: str = "fused"
    of_target: bool = True  # where Gaudi rounds otherwise, as it does


_ROWS = [
    _Row(),
    _Row(cached=True),
    _Row(cached=True, dtype=torch.float32),
    _Row(cached=True, scales="per head"),
    _Row(cached=True, scales="per token"),
    _Row(cached=True, heads=(4, 4), rounds_output=True),
    _Row(cached=True, rounds_probabilities=False),
    _Row(cached=True, mask="padding"),
    _Row(queries=48, mask="causal"),
    _Row(queries=48, mask="causal", heads=(4, 4)),
    _Row(queries=48, mask="causal as booleans"),
    _Row(queries=48, mask="causal", rounds_output=True),
    _Row(queries=48, mask="causal", sinks=True),
    _Row(queries=48, mask="causal", softcap=30.0),
    _Row(queries=48),
    _Row(queries=48, mask="causal", dataflow="unfused"),
    _Row(queries=48, mask="causal", sinks=True, dataflow="unfused"),
    _Row(cached=True, dataflow="unfused"),
    _Row(cached=True, dataflow="unfused", scales="per token"),
    _Row(cached=True, dataflow="fused", of_target=False),
    _Row(queries=48, mask="causal", dataflow="unfused", of_target=False),
    _Row(queries=48, mask="causal", dataflow="qdq"),
]
_WEIGHTS_ROWS = [_Row(queries=48, mask="causal", dataflow=dataflow) for dataflow in ("fused", "unfused", "qdq")]


def cases(fmt: NumberFormat) -> Iterator[Case]:
    """Of `attention`, `attention_weights`, `softmax` and `matmul`."""
    draw = Draw(fmt)
    rows, weights_rows = (_of(fmt, rows) for rows in (_ROWS, _WEIGHTS_ROWS))
    for row in rows:
        exact = not row.rounds_probabilities and row.dataflow in FUSED
        ulps = ULPS[row.dtype] if exact else _ROUNDED_PROBABILITIES
        yield Case("attention", _name(row), _attention(draw, row), ulps=ulps)
    for row in weights_rows:
        whole = _attention(draw, row)
        call = AttentionWeightsCall(**{name: getattr(whole, name) for name in AttentionWeightsCall._fields})
        yield Case("attention_weights", _name(row), call, ulps=_ROUNDED_PROBABILITIES)
    for dtype, factor in ((torch.bfloat16, None), (torch.bfloat16, scale(0.25)), (torch.float32, None)):
        x, p_scale = draw.values(2, 4, 48, 48, dtype=dtype, spread=3.0), scale(2.0**-4)
        call_of_softmax = SoftmaxCall(x, p_scale, factor, -1, fmt.dtype, fmt.full_scale)
        name = named(DTYPE_NAMES[dtype], "with a factor" if factor is not None else "")
        yield Case("softmax", name, call_of_softmax, ulps=_ROUNDED_PROBABILITIES)
    yield from _products(draw)


def _of(fmt: NumberFormat, rows: list[_Row]) -> list[_Row]:
    """The rows with a target's own dataflows, and each only once."""
    own = "_gaudi" if fmt.is_gaudi else ""
    rows = [row._replace(dataflow=row.dataflow + own * row.of_target * (row.dataflow != "qdq")) for row in rows]
    return list(dict.fromkeys(row._replace(of_target=True) for row in rows))


def _attention(draw: Draw, row: _Row) -> AttentionCall:
    fmt, (heads, key_heads) = draw.fmt, row.heads
    shape = (_BATCH, key_heads, row.keys, _DIM)
    key, value = ((draw.codes(*shape) if row.cached else draw.values(*shape, dtype=row.dtype)) for _ in range(2))
    key_scale, value_scale = (_scale(draw, row, shape) for _ in range(2))
    return AttentionCall(
        draw.values(_BATCH, heads, row.queries, _DIM, dtype=row.dtype),
        key,
        value,
        scale(2.0**-4),
        key_scale,
        value_scale,
        scale(2.0**-4) if row.rounds_probabilities else None,
        scale(2.0**-4) if row.rounds_output else None,
        _mask(row),
        draw.values(heads, dtype=row.dtype) if row.sinks else None,
        _DIM**-0.5,
        row.softcap,
        fmt.dtype,
        fmt.full_scale,
        row.dataflow,
    )


def _scale(draw: Draw, row: _Row, shape: tuple[int, ...]) -> torch.Tensor:
    if row.scales == "per tensor":
        return scale(2.0**-4)
    return draw.scales(*((shape[1], 1, 1) if row.scales == "per head" else (*shape[:3], 1)), around=0.06)


def _mask(row: _Row) -> torch.Tensor | None:
    """Added to scores `[B, 1, S, T]`, or boolean."""
    if not row.mask:
        return None
    if row.mask == "padding":
        seen = torch.arange(row.keys) >= torch.tensor([0, 7]).reshape(-1, 1, 1, 1)
        seen = seen.expand(_BATCH, 1, row.queries, row.keys)
    else:
        seen = torch.ones(row.queries, row.keys, dtype=torch.bool).tril().expand(_BATCH, 1, -1, -1)
    if row.mask.endswith("booleans"):
        return seen
    return torch.zeros(seen.shape, dtype=row.dtype).masked_fill(~seen, torch.finfo(row.dtype).min)


def _name(row: _Row) -> str:
    heads = f"{row.heads[0]} heads" if row.heads[0] == row.heads[1] else f"{row.heads[0]}:{row.heads[1]} heads"
    return named(
        DTYPE_NAMES[row.dtype],
        "decode" if row.queries == 1 else "prefill",
        row.dataflow,
        heads,
        row.mask and f"mask {row.mask}",
        "cached codes" if row.cached else "",
        "" if row.scales == "per tensor" else f"keys {row.scales}",
        "" if row.rounds_probabilities else "probabilities as they are",
        "FP8 output" if row.rounds_output else "",
        "sinks" if row.sinks else "",
        "soft cap" if row.softcap else "",
    )


def _products(draw: Draw) -> Iterator[Case]:
    fmt, arithmetic = draw.fmt, "gaudi" if draw.fmt.is_gaudi else "fused"
    per_row, per_position = draw.scales(2, 4, 5, 1, around=0.06), draw.scales(2, 4, 48, 1, around=0.06)
    rows = {
        "both rounded": (draw.values(2, 4, 48, _DIM), scale(2.0**-4), scale(2.0**-4), arithmetic),
        "cached codes": (draw.codes(2, 4, 48, _DIM), scale(2.0**-4), scale(2.0**-4), arithmetic),
        "cached codes, per token": (draw.codes(2, 4, 48, _DIM), per_row, per_position, arithmetic),
        "one rounded": (draw.values(2, 4, 48, _DIM), scale(2.0**-4), None, arithmetic),
        "both rounded, qdq": (draw.values(2, 4, 48, _DIM), scale(2.0**-4), scale(2.0**-4), "qdq"),
    }
    for name, (b, a_scale, b_scale, kind) in rows.items():
        call = MatmulCall(draw.values(2, 4, 5, 48), b, a_scale, b_scale, fmt.dtype, fmt.full_scale, kind)
        yield Case("matmul", named("bf16", name), call, ulps=ULPS[torch.bfloat16])
