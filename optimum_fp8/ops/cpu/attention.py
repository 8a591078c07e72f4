"""Attention on the native library: over codes of a cache, or over keys and values that are rounded to codes here."""

from __future__ import annotations

import torch

from ..arguments import AttentionCall
from ..operands import refuses_format
from ..reference_attention import DATAFLOWS, FUSED
from .attention_call import keeps_scores, pack, row_size
from .attention_prefill import many_queries, many_queries_on_tiles
from .casts import Casts
from .library import FORMATS, TYPES, check

FEW_QUERIES = 16  # up to so many, reading keys and values takes longest; beyond, multiplying does
OF_TILES = ("avx512amx", "avx512bf16", "tiles")  # variants whose attention multiplies tiles of bfloat16


class Attention:
    """The operator `attention` on one variant of the library, whose other kernels do the casts."""

    def __init__(self, casts: Casts, variant: str):
        self.casts, self.multiplies_tiles = casts, variant in OF_TILES

    def refuses(self, call: AttentionCall) -> str | None:
        query, key, value, mask, sinks = call.query, call.key, call.value, call.mask, call.sinks
        if call.dataflow not in DATAFLOWS or call.dataflow == "qdq":
            return f"dataflow {call.dataflow!r}"
        if query.dtype not in TYPES or call.dtype not in FORMATS:
            return f"queries in {query.dtype}, rounded to {call.dtype}"
        if reason := refuses_format(call.dtype, call.full_scale):
            return reason
        for name, x, scale in (("keys", key, call.k_scale), ("values", value, call.v_scale)):
            if scale is None:
                return f"{name} in {x.dtype} without a scale"
            if x.dtype not in FORMATS and x.dtype not in TYPES:
                return f"{name} in {x.dtype}"
        if _misfit(query, key, value):
            return f"queries {tuple(query.shape)}, keys {tuple(key.shape)}, values {tuple(value.shape)}"
        if mask is not None and (reason := _refuses_mask(mask, (*query.shape[:3], key.shape[2]))):
            return reason
        if sinks is not None and (
            sinks.dtype not in TYPES or tuple(sinks.shape) not in ((query.shape[1],), (*query.shape[:3], 1))
        ):
            return f"sinks in {sinks.dtype} of shape {tuple(sinks.shape)}"
        return _refuses_scales(call)

    def run(self, call: AttentionCall) -> torch.Tensor:
        query, mask, sinks = call.query, call.mask, call.sinks
        assert call.k_scale is not None and call.v_scale is not None  # or it was refused
        rows = (*query.shape[:3], 1)
        call = call._replace(
            query=query if query.stride(3) == 1 else query.contiguous(),
            key=self._codes(call.key, call.k_scale, call),
            value=self._codes(call.value, call.v_scale, call),
            k_scale=_packed(call.k_scale),
            v_scale=_packed(call.v_scale),
            output_scale=call.output_scale if call.dataflow in FUSED else None,
            mask=None if mask is None else _expanded_mask(mask, (*rows[:3], call.key.shape[2])),
            sinks=sinks.reshape(1, -1, 1, 1).expand(rows) if sinks is not None and sinks.ndim == 1 else sinks,
        )
        if query.shape[2] <= FEW_QUERIES:
            return self._attend(call)
        fits_bfloat16 = call.q_scale is not None or query.dtype == torch.bfloat16
        if self.multiplies_tiles and fits_bfloat16:
            return many_queries_on_tiles(call, self._attend)
        return many_queries(self.casts, call)

    def _codes(self, x: torch.Tensor, scale: torch.Tensor, call: AttentionCall) -> torch.Tensor:
        if x.dtype not in FORMATS:
            by_head = scale.expand(*x.shape[:2], 1, 1) if scale.ndim == 3 else scale
            x = self.casts.cast_to_fp8(x, by_head, call.dtype, call.full_scale)
        return x if x.stride(3) == 1 or x.shape[3] == 1 else x.contiguous()

    def _attend(self, call: AttentionCall) -> torch.Tensor:
        batch, heads, queries, _ = call.query.shape
        scores = None
        if keeps_scores(call):
            shape = (batch * heads * queries, row_size(call.key.shape[2]))
            scores = call.query.new_empty(shape, dtype=torch.float32)
        output = call.query.new_empty((batch, queries, heads, call.value.shape[3]))
        check(self.casts.library.attention(pack(call, self.casts.variant, scores, output)), "attention")
        return output


def _misfit(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
    q, k, v = query.shape, key.shape, value.shape
    if not len(q) == len(k) == len(v) == 4 or 0 in k:
        return True
    return k[:3] != v[:3] or q[0] != k[0] or q[1] % k[1] != 0 or q[3] != k[3]


def _refuses_mask(mask: torch.Tensor, wanted: tuple[int, ...]) -> str | None:
    if mask.dtype not in TYPES and mask.dtype != torch.bool:
        return f"a mask in {mask.dtype}"
    shape = (1,) * (4 - mask.ndim) + tuple(mask.shape)
    if len(shape) > 4 or shape[3] < wanted[3] or any(n not in (1, w) for n, w in zip(shape, wanted[:3], strict=False)):
        return f"a mask of {tuple(mask.shape)} for scores of {wanted}"
    return None


def _fits(scale: torch.Tensor, x: torch.Tensor) -> bool:
    """Whether `scale` is `(1,)`, one a head, or one a row of `x`."""
    shape = scale.shape
    if scale.dtype != torch.float32:
        return False
    return shape == (1,) or shape == (x.shape[1], 1, 1) or shape == (*x.shape[:3], 1)


def _refuses_scales(call: AttentionCall) -> str | None:
    operands = (("queries", call.q_scale, call.query), ("keys", call.k_scale, call.key))
    for name, scale, x in (*operands, ("values", call.v_scale, call.value)):
        if scale is not None and not _fits(scale, x):
            return f"scales of {name} in {scale.dtype} of shape {tuple(scale.shape)} for {tuple(x.shape)}"
    for scale in (call.p_scale, call.output_scale):
        if scale is not None and (scale.dtype != torch.float32 or scale.numel() != 1):
            return f"a scale in {scale.dtype} of shape {tuple(scale.shape)} for probabilities or the output"
    return None


def _packed(scale: torch.Tensor) -> torch.Tensor:
    """A scale whose positions are neighbours, or that has one for all."""
    return scale.contiguous() if scale.ndim == 4 and scale.stride(2) != 1 else scale


def _expanded_mask(mask: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    mask = mask[..., : shape[3]]
    mask = mask if mask.stride(-1) == 1 else mask.contiguous()
    return mask.expand(shape)
