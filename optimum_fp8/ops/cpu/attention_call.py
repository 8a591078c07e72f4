"""One call of attention: its tensors, and how they become the native library's arguments."""

from __future__ import annotations

from struct import Struct
from typing import NamedTuple

import torch

from .library import threads

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
FORMATS = {torch.float8_e4m3fn: 0, torch.float8_e5m2: 1}
_BOOLEAN = 3
_ARGUMENTS = Struct("=54q3d")
_NO_MASK, _NO_SINKS = (0,) * 6, (0,) * 5
_WIDEST = 16  # floats in a vector, on any processor


def row_size(keys: int) -> int:
    """Floats a row of scores takes: whole vectors."""
    return -(-keys // _WIDEST) * _WIDEST


class Options(NamedTuple):
    """What is the same for all positions, as the operator takes it."""

    scaling: float
    softcap: float
    dtype: torch.dtype
    full_scale: float
    dataflow: str


class Call(NamedTuple):
    """The operands, with a contiguous last dimension.

    A generated token makes one such call a layer, with caches gone cold in between: what happens here is kept short.

    Attributes:
        query: `[B, H, S, D]`, high precision.
        key: FP8 codes `[B, Hkv, T, D]`.
        value: FP8 codes `[B, Hkv, T, Dv]`.
        q_scale: `(1,)`, `(H, 1, 1)`, `[B, H, S, 1]` or None.
        k_scale: `(1,)`, `(Hkv, 1, 1)` or `[B, Hkv, T, 1]`; along T it is contiguous.
        v_scale: the same.
        p_scale: `(1,)` or None.
        output_scale: `(1,)` or None.
        mask: `[B, H, S, T]` or None.
        sinks: `[B, H, S, 1]` or None.
        options: the rest.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    q_scale: torch.Tensor | None
    k_scale: torch.Tensor
    v_scale: torch.Tensor
    p_scale: torch.Tensor | None
    output_scale: torch.Tensor | None
    mask: torch.Tensor | None
    sinks: torch.Tensor | None
    options: Options

    def expanded(self) -> Call:
        """The same with scales as views of their full shapes."""
        rows, positions = (*self.query.shape[:3], 1), (*self.key.shape[:3], 1)
        return self._replace(
            q_scale=None if self.q_scale is None else self.q_scale.expand(rows),
            k_scale=self.k_scale.expand(positions),
            v_scale=self.v_scale.expand(positions),
        )

    def part(self, batch: int, key_head: int, queries: slice, keys: int) -> Call:
        """Of an expanded call: the queries `queries` of one sequence that share a head of keys, and its first `keys`
        positions."""
        group = self.query.shape[1] // self.key.shape[1]
        one, heads, first = slice(batch, batch + 1), slice(key_head * group, (key_head + 1) * group), slice(keys)
        rows, positions = (one, heads, queries), (one, slice(key_head, key_head + 1), first)
        return Call(
            query=self.query[rows],
            key=self.key[positions],
            value=self.value[positions],
            q_scale=None if self.q_scale is None else self.q_scale[rows],
            k_scale=self.k_scale[positions],
            v_scale=self.v_scale[positions],
            p_scale=self.p_scale,
            output_scale=self.output_scale,
            mask=None if self.mask is None else self.mask[(*rows, first)],
            sinks=None if self.sinks is None else self.sinks[rows],
            options=self.options,
        )

    def rounds_probabilities(self) -> bool:
        """Whether their sum must be known before they are multiplied with values: then all scores are kept."""
        return self.p_scale is not None or self.options.dataflow != "fused"

    def pack(self, variant: int, scores: torch.Tensor | None, output: torch.Tensor | None) -> bytes:
        """The arguments; `scores` is scratch, float32 `[B · H · S, row_size(T)]`, where all scores are kept."""
        query, key, value, options, mask, sinks = *self[:3], self.options, self.mask, self.sinks
        batch, heads, queries, dim = query.shape
        _, key_heads, keys, value_dim = value.shape
        return _ARGUMENTS.pack(
            *(variant, threads(), batch, heads, key_heads, queries, keys, dim, value_dim),
            *(TYPES[query.dtype], FORMATS[options.dtype]),
            *(query.data_ptr(), *query.stride()[:3]),
            *(key.data_ptr(), FORMATS[key.dtype], *key.stride()[:3]),
            *(value.data_ptr(), FORMATS[value.dtype], *value.stride()[:3]),
            *_scale(self.q_scale),
            *_scale(self.k_scale),
            *_scale(self.v_scale),
            0 if self.p_scale is None else self.p_scale.data_ptr(),
            0 if self.output_scale is None else self.output_scale.data_ptr(),
            *(_NO_MASK if mask is None else _mask(mask)),
            *(_NO_SINKS if sinks is None else (sinks.data_ptr(), TYPES[sinks.dtype], *sinks.stride()[:3])),
            *((0, 0) if scores is None else (scores.data_ptr(), scores.stride(0))),
            0 if output is None else output.data_ptr(),
            options.dataflow != "fused",
            *(options.full_scale, options.scaling, options.softcap),
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
