"""The reference of attention's operators: plain torch that defines the result, down to each rounding, on any device.

All products are formed from FP8 values (or unrounded ones) held in float32 (float64 for float64 queries) and
accumulated there; the scales of both operands, multiplied with one another, are multiplied in afterwards. What lies
between the products is the `dataflow`:

* "fused": scores, scaling, soft cap, mask and softmax stay in float32; the probabilities are rounded to FP8; the second
  product is rounded to FP8 where there is an `output_scale`, then once to the query's dtype.
* "unfused": the scores are rounded to the query's dtype as a matmul's output is, and scaled, capped and masked in it;
  the softmax is taken in float32 and rounded to that dtype, then to FP8; the second product is rounded to that dtype.
* "fused_gaudi" and "unfused_gaudi": the same but for the probabilities, which are rounded once: to FP8, or where they
  have no scale to the query's dtype.
* "qdq": as "unfused", and each operand is rounded to FP8 and back to the query's dtype before its product.

Keys and values that are FP8 codes already are converted in blocks of positions: there never is a high-precision copy of
a whole cache, except in "qdq", which is to make one.
"""

from __future__ import annotations

from functools import reduce

import torch

from ..errors import FP8ConfigError, FP8ScaleError, nearest
from ..formats import is_fp8
from .arguments import AttentionCall, AttentionWeightsCall, MatmulCall, SoftmaxCall
from .reference import cast_from_fp8, cast_to_fp8

DATAFLOWS = ("fused", "unfused", "fused_gaudi", "unfused_gaudi", "qdq")
FUSED = ("fused", "fused_gaudi")
_BLOCK = 2048  # positions of a cache that are converted at a time


def attention(call: AttentionCall) -> torch.Tensor:
    p_scale, output_scale, dataflow = call.p_scale, call.output_scale, call.dataflow
    probabilities = _probabilities(call)
    values, scale = _operand(call.value, call.v_scale, call)
    result = _weighted_sum(probabilities, values, scale)
    per_tensor = p_scale if dataflow != "qdq" else None
    result = _scaled(result, per_tensor, None if scale is None or scale.ndim == 4 else _of_key_heads(scale))
    result = result.flatten(1, 2).transpose(1, 2).contiguous()
    if output_scale is not None and dataflow in FUSED:
        codes = cast_to_fp8(result, output_scale, call.dtype, call.full_scale)
        result = cast_from_fp8(codes, output_scale, torch.float32)
    return result.to(call.query.dtype)


def attention_weights(call: AttentionWeightsCall) -> torch.Tensor:
    probabilities = _probabilities(call)
    if call.p_scale is not None and call.dataflow != "qdq":
        probabilities = probabilities * call.p_scale
    return probabilities.flatten(1, 2).to(call.query.dtype)


def softmax(call: SoftmaxCall) -> torch.Tensor:
    x = _wide(call.x) if call.factor is None else _wide(call.x) * call.factor
    codes = cast_to_fp8(x.softmax(call.dim), call.scale, call.dtype, call.full_scale)
    return cast_from_fp8(codes, call.scale, call.x.dtype)


def matmul(call: MatmulCall) -> torch.Tensor:
    a, b, a_scale, b_scale, dtype, full_scale, arithmetic = call
    if arithmetic == "qdq":
        operands = ((a, a_scale), (b, b_scale))
        return torch.matmul(*(_dequantized(x, scale, a.dtype, dtype, full_scale) for x, scale in operands))
    left, right = _rounded(a, a_scale, dtype, full_scale), _rounded(b, b_scale, dtype, full_scale)
    by_rows = b_scale is not None and b_scale.ndim > 1 and b_scale.shape[-2] > 1
    result = _product(_wide(left), right, b_scale if by_rows else None)
    return _scaled(result, a_scale, None if by_rows else b_scale).to(a.dtype)


def _scaled(product: torch.Tensor, a_scale: torch.Tensor | None, b_scale: torch.Tensor | None) -> torch.Tensor:
    """`product` times the scales of its operands, which are multiplied with one another first."""
    scales = [scale.to(product.dtype) for scale in (a_scale, b_scale) if scale is not None]
    return product * reduce(torch.mul, scales) if scales else product


def _product(left: torch.Tensor, right: torch.Tensor, row_scale: torch.Tensor | None) -> torch.Tensor:
    """left @ right in the dtype of `left`; a scale for each row of `right` is applied to it before rows are summed.

    Codes are converted in blocks of the longer dimension, which are the positions of a cache.
    """

    def values(block: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
        return block.to(left.dtype) if scale is None else block.to(left.dtype) * scale

    if not is_fp8(right.dtype):
        return left @ values(right, row_scale)
    if right.shape[-1] > right.shape[-2]:
        return torch.cat([left @ values(block, row_scale) for block in right.split(_BLOCK, -1)], dim=-1)
    blocks = right.split(_BLOCK, -2)
    scales = [None] * len(blocks) if row_scale is None else row_scale.split(_BLOCK, -2)
    parts = zip(left.split(_BLOCK, -1), blocks, scales, strict=True)
    return reduce(torch.add, (part @ values(block, scale) for part, block, scale in parts))


def _probabilities(call: AttentionCall | AttentionWeightsCall) -> torch.Tensor:
    """Softmax rounded to FP8, `[B, Hkv, H / Hkv, S, T]`, as codes in float32 (in "qdq" times their scale)."""
    query, key_heads, p_scale, dataflow = call.query, call.key.shape[1], call.p_scale, call.dataflow
    if dataflow not in DATAFLOWS:
        raise FP8ConfigError(f"dataflow={dataflow!r} is unknown: {nearest(dataflow, DATAFLOWS)}")
    queries, query_scale = _operand(query, call.q_scale, call)
    keys, key_scale = _operand(call.key, call.k_scale, call)
    scores = _scores(_grouped(queries, key_heads), keys)
    of_queries = None if query_scale is None else _grouped_scale(query_scale, key_heads)
    of_keys = None if key_scale is None else _of_key_heads(key_scale) if key_scale.ndim <= 3 else _per_key(key_scale)
    scores = _scaled(scores, of_queries, of_keys)
    if dataflow not in FUSED:
        scores = scores.to(query.dtype)
    probabilities = _wide(softmax_input(scores, call)).softmax(dim=-1)[..., : call.key.shape[2]]
    if rounds_probabilities(dataflow, p_scale):
        probabilities = probabilities.to(query.dtype)
    if p_scale is None:
        return _wide(probabilities)
    codes = cast_to_fp8(probabilities, p_scale, call.dtype, call.full_scale)
    return _wide(cast_from_fp8(codes, p_scale, query.dtype) if dataflow == "qdq" else codes)


def softmax_input(scores: torch.Tensor, call: AttentionCall | AttentionWeightsCall) -> torch.Tensor:
    """Products `[B, Hkv, H / Hkv, S, T]` scaled, capped and masked in their dtype; sinks are one more column."""
    key_heads = call.key.shape[1]
    scores = _capped(scores * call.scaling, call.softcap)
    if call.mask is not None:
        scores = _masked(scores, call.mask, key_heads)
    return scores if call.sinks is None else torch.cat([scores, _column(call.sinks, scores)], dim=-1)


def rounds_probabilities(dataflow: str, p_scale: torch.Tensor | None) -> bool:
    """Whether the softmax's output is rounded to the query's dtype, before it is to FP8 if it has a scale."""
    return dataflow in ("unfused", "qdq") or (dataflow.endswith("_gaudi") and p_scale is None)


def _operand(
    x: torch.Tensor, scale: torch.Tensor | None, call: AttentionCall | AttentionWeightsCall
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What a product takes: FP8 codes and the scale to multiply its result with, or values and None."""
    if scale is None:
        return _unscaled(x), None
    if call.dataflow == "qdq":
        return _dequantized(x, scale, call.query.dtype, call.dtype, call.full_scale), None
    return _rounded(x, scale, call.dtype, call.full_scale), scale


def _dequantized(
    x: torch.Tensor, scale: torch.Tensor | None, hp_dtype: torch.dtype, dtype: torch.dtype, full_scale: float
) -> torch.Tensor:
    if scale is None:
        return _unscaled(x)
    return cast_from_fp8(_rounded(x, scale, dtype, full_scale), scale, hp_dtype)


def _rounded(x: torch.Tensor, scale: torch.Tensor | None, dtype: torch.dtype, full_scale: float) -> torch.Tensor:
    if scale is None:
        return _unscaled(x)
    return x if is_fp8(x.dtype) else cast_to_fp8(x, scale, dtype, full_scale)


def _unscaled(x: torch.Tensor) -> torch.Tensor:
    if is_fp8(x.dtype):
        raise FP8ScaleError(f"attention was given FP8 codes {tuple(x.shape)} without their scale")
    return x


def _wide(x: torch.Tensor) -> torch.Tensor:
    """`x` in the dtype of products: float64 stays, everything else becomes float32."""
    return x if x.dtype == torch.float64 else x.float()


def _blocks(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return x.split(_BLOCK, dim=2) if is_fp8(x.dtype) else (x,)


def _grouped(x: torch.Tensor, key_heads: int) -> torch.Tensor:
    """`[B, H, S, D]` as `[B, Hkv, H / Hkv, S, D]`: the queries that share a head of keys."""
    return _wide(x).unflatten(1, (key_heads, -1))


def _grouped_scale(scale: torch.Tensor, key_heads: int) -> torch.Tensor:
    """A query's scale, `(1,)`, `(H, 1, 1)` or `[B, H, S, 1]`, along grouped scores."""
    return scale if scale.numel() == 1 else scale.unflatten(-3, (key_heads, -1))


def _of_key_heads(scale: torch.Tensor) -> torch.Tensor:
    """A static scale of keys or values, `(1,)` or `(Hkv, 1, 1)`, along grouped scores or outputs."""
    return scale if scale.numel() == 1 else scale.reshape(-1, 1, 1, 1)


def _per_key(scale: torch.Tensor) -> torch.Tensor:
    """A scale per position `[B, Hkv, T, 1]` along grouped scores, whose last dimension are the positions."""
    return scale.transpose(2, 3).unsqueeze(2)


def _scores(grouped: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    rows = grouped.flatten(2, 3)  # the heads of a group share their keys: one product for all of them
    parts = [rows @ _wide(block).transpose(-1, -2) for block in _blocks(keys)]
    return (parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)).unflatten(2, grouped.shape[2:4])


def _weighted_sum(probabilities: torch.Tensor, values: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    """P · V, `[B, Hkv, H / Hkv, S, Dv]`; a scale per position is applied to the values before they are summed."""
    rows, total, start = probabilities.flatten(2, 3), None, 0
    for block in _blocks(values):
        stop = start + block.shape[2]
        wide = _wide(block)
        if scale is not None and scale.ndim == 4:
            wide = wide * scale[:, :, start:stop]
        part = rows[..., start:stop] @ wide
        total, start = part if total is None else total + part, stop
    assert total is not None
    return total.unflatten(2, probabilities.shape[2:4])


def _capped(scores: torch.Tensor, softcap: float) -> torch.Tensor:
    return torch.tanh(scores / softcap) * softcap if softcap else scores


def _masked(scores: torch.Tensor, mask: torch.Tensor, key_heads: int) -> torch.Tensor:
    """Add a mask `[…, H or 1, S, T]`, or keep what a boolean one allows."""
    while mask.ndim < 4:
        mask = mask.unsqueeze(0)
    mask = mask[..., : scores.shape[-1]]  # the model's eager attention leaves positions to come in a static mask
    grouped = mask.unsqueeze(2) if mask.shape[1] == 1 else mask.unflatten(1, (key_heads, -1))
    if grouped.dtype == torch.bool:
        return scores.masked_fill(~grouped, torch.finfo(scores.dtype).min)
    return scores + grouped.to(scores.dtype)


def _column(sinks: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """`sinks` `(H,)` or `[B, H, S, 1]`, scores that take their share of the softmax and have no value, for each row."""
    key_heads = scores.shape[1]
    sinks = sinks.reshape(1, key_heads, -1, 1, 1) if sinks.ndim == 1 else sinks.unflatten(1, (key_heads, -1))
    return sinks.to(scores.dtype).expand(*scores.shape[:-1], 1)
