"""Attention of many queries: the products of exact FP8 values in float32 are torch's, what lies between is native.

Queries are taken in blocks and heads one after the other, so that no more than one head's keys and values are in
float32 at a time, and the scores of a block stay in cache. Where the library multiplies tiles, all of it is native.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import torch

from ..arguments import AttentionCall
from .attention_call import expanded, keeps_scores, pack, part, row_size
from .casts import Casts
from .library import check

_SCORES = 1 << 19  # of a block: 2 MiB
_LEAST_QUERIES, _MOST_QUERIES = 16, 256  # of a block
_ROWS, _KEPT_SCORES = 128, 1 << 23  # of a block on tiles: rows that share a head of keys, and scores, 32 MiB at most


def many_queries(casts: Casts, call: AttentionCall) -> torch.Tensor:
    """`[B, S, H, Dv]`, contiguous, in the query's dtype."""
    call = expanded(call)
    batch, heads, queries, _ = call.query.shape
    key_heads, keys, value_dim = call.value.shape[1:]
    group = heads // key_heads
    size = min(max(_SCORES // (group * keys), _LEAST_QUERIES), _MOST_QUERIES)
    blocks = [slice(start, min(start + size, queries)) for start in range(0, queries, size)]
    rows = _queries(casts, call)
    output = call.query.new_empty((batch, queries, heads, value_dim))
    scores = rows.new_empty(group * min(size, queries) * row_size(keys))
    seen = _seen(call, blocks) if _is_finite(call, rows) else [[keys] * len(blocks)] * batch
    for sequence, head in product(range(batch), range(key_heads)):
        key, value = (_values(casts, x[sequence, head]) for x in (call.key, call.value))
        finite = bool(value.sum().isfinite()) and bool(key.sum().isfinite())
        for block, visible in zip(blocks, seen[sequence], strict=True):
            some = part(call, sequence, slice(head, head + 1), block, visible if finite else keys)
            first = rows[sequence, head * group : (head + 1) * group, block].flatten(0, 1)
            result = _block(casts, some, first, key, value, scores)
            output[sequence, block, head * group : (head + 1) * group] = result.unflatten(0, (group, -1)).transpose(
                0, 1
            )
    return output


def many_queries_on_tiles(call: AttentionCall, attend: Callable[[AttentionCall], torch.Tensor]) -> torch.Tensor:
    """The same where the library multiplies tiles, and `attend` calls it: queries are taken in blocks, of which no
    positions are read that are masked for all, and all heads at once. Keys and values are decoded again for each block,
    which takes little beside `_ROWS` rows that are multiplied with them."""
    call = expanded(call)
    batch, heads, queries, _ = call.query.shape
    key_heads, keys, value_dim = call.value.shape[1:]
    most = _ROWS * key_heads // heads
    most = min(most, _KEPT_SCORES // (heads * keys)) if keeps_scores(call) else most
    size = max(most, _LEAST_QUERIES)
    blocks = [slice(start, min(start + size, queries)) for start in range(0, queries, size)]
    output = call.query.new_empty((batch, queries, heads, value_dim))
    finite = _is_finite(call, call.query) and not any(map(_has_special_codes, (call.key, call.value)))
    seen = _seen(call, blocks) if finite else [[keys] * len(blocks)] * batch
    for sequence, visible in enumerate(seen):
        for block, last in zip(blocks, visible, strict=True):
            output[sequence, block] = attend(part(call, sequence, slice(0, key_heads), block, last))[0]
    return output


def _has_special_codes(codes: torch.Tensor) -> bool:
    """Whether any is NaN or infinite."""
    least = 0x7F if codes.dtype == torch.float8_e4m3fn else 0x7C
    return codes.numel() > 0 and int((codes.view(torch.uint8) & 0x7F).amax()) >= least


def _queries(casts: Casts, call: AttentionCall) -> torch.Tensor:
    """The first operand of the first product, in float32: codes where there is a scale."""
    if call.q_scale is None:
        return call.query.float()
    scale = call.q_scale.contiguous()
    codes = casts.cast_to_fp8(call.query, scale, call.dtype, call.full_scale)
    return _values(casts, codes)


def _values(casts: Casts, codes: torch.Tensor) -> torch.Tensor:
    one = torch.ones(1, dtype=torch.float32, device=codes.device)
    return casts.cast_from_fp8(codes, one, torch.float32)


def _block(
    casts: Casts,
    some: AttentionCall,
    rows: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    room: torch.Tensor,
) -> torch.Tensor:
    """A block of queries over one head of keys: `[rows, Dv]`."""
    count, keys = rows.shape[0], some.key.shape[2]
    stride = row_size(keys)
    padded = room[: count * stride].view(count, stride)
    scores = padded[:, :keys]
    torch.mm(rows, key[:keys].t(), out=scores)
    check(casts.library.softmax(pack(some, casts.variant, padded, None)), "attention")
    result = scores @ value[:keys]
    assert some.v_scale is not None  # or it was refused
    scale = some.p_scale
    if some.v_scale.stride(2) == 0:  # one a position was multiplied with probabilities
        v_scale = some.v_scale[0, 0, 0]
        scale = v_scale if scale is None else scale * v_scale
    if scale is not None:
        result.mul_(scale)
    if some.output_scale is not None:
        codes = casts.cast_to_fp8(result, some.output_scale, some.dtype, some.full_scale)
        result = casts.cast_from_fp8(codes, some.output_scale, torch.float32)
    return result


def _is_finite(call: AttentionCall, rows: torch.Tensor) -> bool:
    """Whether no query and no scale is NaN or infinite."""
    return all(bool(x.sum().isfinite()) for x in (rows, call.q_scale, call.k_scale, call.v_scale) if x is not None)


def _seen(call: AttentionCall, blocks: list[slice]) -> list[list[int]]:
    """For each sequence and block, so many first positions that all behind are masked for all of its queries: their
    probabilities are exactly 0. All positions, where a query may attend to none."""
    keys, batch = call.key.shape[2], call.query.shape[0]
    if call.mask is None or call.mask.dtype == torch.float16:  # whose least value is not far from a score
        return [[keys] * len(blocks)] * batch
    mask = call.mask[:, :1] if call.mask.stride(1) == 0 else call.mask
    mask = mask[:1] if mask.stride(0) == 0 else mask
    found = [[_last_open(sequence[:, block], keys) for block in blocks] for sequence in mask]
    return found * (batch // len(found))


def _last_open(mask: torch.Tensor, keys: int) -> int:
    """Largest values are looked at, which are found fast, though not of booleans; NaN is open, as it is no less."""
    least = 0 if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
    mask = mask.view(torch.uint8) if mask.dtype == torch.bool else mask
    if (mask.amax(dim=-1) <= least).any():
        return keys
    return int((mask.amax(dim=tuple(range(mask.ndim - 1))) <= least).logical_not().nonzero()[-1]) + 1
