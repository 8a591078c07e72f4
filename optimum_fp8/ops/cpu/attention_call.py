"""A call of attention as the native library takes it: expanded, cut into parts, and packed.

Calls here have gone through `Attention.run`: keys and values are FP8 codes with scales, last dimensions are contiguous,
scales per position are contiguous along the positions, mask and sinks have their full shapes `[B, H, S, T]` and
`[B, H, S, 1]`. A generated token makes one such call a layer, with caches gone cold in between: what happens here is
kept short.
"""

from __future__ import annotations

from struct import Struct

import torch

from ..arguments import AttentionCall
from ..reference_attention import FUSED, rounds_probabilities
from .library import FORMATS, TYPES, threads

_BOOLEAN = 3
_ARGUMENTS = Struct("=55q3d")
_NO_MASK, _NO_SINKS = (0,) * 6, (0,) * 5
_WIDEST = 16  # floats in a vector, on any processor


def row_size(keys: int) -> int:
    """Floats a row of scores takes: whole vectors."""
    return -(-keys // _WIDEST) * _WIDEST


def expanded(call: AttentionCall) -> AttentionCall:
    """The same with scales as views of their full shapes."""
    rows, positions = (*call.query.shape[:3], 1), (*call.key.shape[:3], 1)
    return call._replace(
        q_scale=None if call.q_scale is None else call.q_scale.expand(rows),
        k_scale=None if call.k_scale is None else call.k_scale.expand(positions),
        v_scale=None if call.v_scale is None else call.v_scale.expand(positions),
    )


def part(call: AttentionCall, batch: int, key_heads: slice, queries: slice, keys: int) -> AttentionCall:
    """Of an expanded call: the queries `queries` of one sequence that share some heads of keys, and the first `keys`
    positions of those."""
    group = call.query.shape[1] // call.key.shape[1]
    one, heads, first = slice(batch, batch + 1), slice(key_heads.start * group, key_heads.stop * group), slice(keys)
    rows, positions = (one, heads, queries), (one, key_heads, first)
    return call._replace(
        query=call.query[rows],
        key=call.key[positions],
        value=call.value[positions],
        q_scale=None if call.q_scale is None else call.q_scale[rows],
        k_scale=None if call.k_scale is None else call.k_scale[positions],
        v_scale=None if call.v_scale is None else call.v_scale[positions],
        mask=None if call.mask is None else call.mask[(*rows, first)],
        sinks=None if call.sinks is None else call.sinks[rows],
    )


def keeps_scores(call: AttentionCall) -> bool:
    """Whether the sum of probabilities must be known before they are multiplied with values, since they are rounded."""
    return call.p_scale is not None or call.dataflow != "fused"


def pack(call: AttentionCall, variant: int, scores: torch.Tensor | None, output: torch.Tensor | None) -> bytes:
    """The arguments; `scores` is scratch, float32 `[B · H · S, row_size(T)]`, where all scores are kept."""
    query, key, value, mask, sinks = call.query, call.key, call.value, call.mask, call.sinks
    batch, heads, queries, dim = query.shape
    _, key_heads, keys, value_dim = value.shape
    return _ARGUMENTS.pack(
        *(variant, threads(), batch, heads, key_heads, queries, keys, dim, value_dim),
        *(TYPES[query.dtype], FORMATS[call.dtype]),
        *(query.data_ptr(), *query.stride()[:3]),
        *(key.data_ptr(), FORMATS[key.dtype], *key.stride()[:3]),
        *(value.data_ptr(), FORMATS[value.dtype], *value.stride()[:3]),
        *_scale(call.q_scale),
        *_scale(call.k_scale),
        *_scale(call.v_scale),
        0 if call.p_scale is None else call.p_scale.data_ptr(),
        0 if call.output_scale is None else call.output_scale.data_ptr(),
        *(_NO_MASK if mask is None else _mask(mask)),
        *(_NO_SINKS if sinks is None else (sinks.data_ptr(), TYPES[sinks.dtype], *sinks.stride()[:3])),
        *((0, 0) if scores is None else (scores.data_ptr(), scores.stride(0))),
        0 if output is None else output.data_ptr(),
        *(call.dataflow not in FUSED, rounds_probabilities(call.dataflow, call.p_scale)),
        *(call.full_scale, call.scaling, call.softcap),
    )


def _scale(scale: torch.Tensor | None) -> tuple[int, ...]:
    """Where a scale is, and its strides along `[batch, heads, positions]`."""
    if scale is None:
        return (0, 0, 0, 0)
    if scale.ndim == 4:
        return (scale.data_ptr(), *scale.stride()[:3])
    return (scale.data_ptr(), 0, scale.stride(0) if scale.ndim == 3 else 0, 0)


def _mask(mask: torch.Tensor) -> tuple[int, ...]:
    return (mask.data_ptr(), TYPES.get(mask.dtype, _BOOLEAN), mask.element_size(), *mask.stride()[:3])
