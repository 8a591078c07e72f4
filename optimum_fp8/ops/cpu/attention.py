"""Attention on the native library: over codes of a cache, or over keys and values that are rounded to codes here."""

from __future__ import annotations

from collections.abc import Callable
from struct import Struct

import torch

from .library import Library, check, threads

_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_BOOLEAN = 3
_FORMATS = {torch.float8_e4m3fn: 0, torch.float8_e5m2: 1}
_DATAFLOWS = ("fused", "unfused")
_ARGUMENTS = Struct("=54q3d")
_ALIGNMENT = 16  # scores of a row, so that each row is whole vectors on every processor
_NONE = (0, 0, 0, 0)

CastToFp8 = Callable[[torch.Tensor, torch.Tensor, torch.dtype, float], torch.Tensor]


def refuses_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    q_scale: torch.Tensor | None,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
    p_scale: torch.Tensor | None,
    output_scale: torch.Tensor | None,
    mask: torch.Tensor | None,
    sinks: torch.Tensor | None,
    scaling: float,
    softcap: float,
    dtype: torch.dtype,
    full_scale: float,
    dataflow: str,
) -> str | None:
    """Why the native library cannot run this call, or None."""
    if dataflow not in _DATAFLOWS:
        return f"dataflow {dataflow!r}"
    if query.dtype not in _TYPES or dtype not in _FORMATS:
        return f"queries in {query.dtype}, rounded to {dtype}"
    for name, x, scale in (("keys", key, k_scale), ("values", value, v_scale)):
        if scale is None:
            return f"{name} in {x.dtype} without a scale"
        if x.dtype not in _FORMATS and x.dtype not in _TYPES:
            return f"{name} in {x.dtype}"
    if reason := _refuses_shapes(query, key, value, mask, sinks):
        return reason
    for name, scale, x in (("queries", q_scale, query), ("keys", k_scale, key), ("values", v_scale, value)):
        if scale is not None and not _fits(scale, x):
            return f"scales of {name} in {scale.dtype} of shape {tuple(scale.shape)} for {tuple(x.shape)}"
    for scale in (p_scale, output_scale):
        if scale is not None and (scale.dtype != torch.float32 or scale.numel() != 1):
            return f"a scale in {scale.dtype} of shape {tuple(scale.shape)} for probabilities or the output"
    return None


def _refuses_shapes(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    sinks: torch.Tensor | None,
) -> str | None:
    shapes = f"queries {tuple(query.shape)}, keys {tuple(key.shape)}, values {tuple(value.shape)}"
    if not query.ndim == key.ndim == value.ndim == 4 or key.shape[:3] != value.shape[:3] or 0 in key.shape:
        return shapes
    if query.shape[0] != key.shape[0] or query.shape[1] % key.shape[1] or query.shape[3] != key.shape[3]:
        return shapes
    if mask is not None:
        wanted = (*query.shape[:3], key.shape[2])
        shape = (1,) * (4 - mask.ndim) + tuple(mask.shape)
        if mask.dtype not in _TYPES and mask.dtype != torch.bool:
            return f"a mask in {mask.dtype}"
        if len(shape) > 4 or any(n not in (1, w) for n, w in zip(shape[:3], wanted[:3], strict=True)):
            return f"a mask of {tuple(mask.shape)} for scores of {wanted}"
        if shape[3] < wanted[3]:
            return f"a mask of {tuple(mask.shape)} for scores of {wanted}"
    if sinks is not None and (
        sinks.dtype not in _TYPES or tuple(sinks.shape) not in ((query.shape[1],), (*query.shape[:3], 1))
    ):
        return f"sinks in {sinks.dtype} of shape {tuple(sinks.shape)}"
    return None


def _fits(scale: torch.Tensor, x: torch.Tensor) -> bool:
    """Whether `scale` is `(1,)`, one a head, or one a row of `x`."""
    shapes = ((1,), (x.shape[1], 1, 1), (*x.shape[:3], 1))
    return scale.dtype == torch.float32 and tuple(scale.shape) in shapes


class Attention:
    """`attention` on one variant of the library; `cast` rounds keys and values that are not codes."""

    def __init__(self, library: Library, variant: str, cast: CastToFp8):
        self.library, self.variant, self.cast = library, library.variants[variant], cast

    refuses = staticmethod(refuses_attention)

    def __call__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        q_scale: torch.Tensor | None,
        k_scale: torch.Tensor,
        v_scale: torch.Tensor,
        p_scale: torch.Tensor | None,
        output_scale: torch.Tensor | None,
        mask: torch.Tensor | None,
        sinks: torch.Tensor | None,
        scaling: float,
        softcap: float,
        dtype: torch.dtype,
        full_scale: float,
        dataflow: str,
    ) -> torch.Tensor:
        batch, heads, queries, _ = query.shape
        length, value_dim = value.shape[2:]
        query = query if query.stride(3) == 1 else query.contiguous()
        # What is made here must live until the call returns.
        key = self._codes(key, k_scale, dtype, full_scale)
        value = self._codes(value, v_scale, dtype, full_scale)
        k_scale, v_scale = _packed_scale(k_scale), _packed_scale(v_scale)
        mask = None if mask is None else _expanded_mask(mask, (batch, heads, queries, length))
        stride = -(-length // _ALIGNMENT) * _ALIGNMENT
        scores = query.new_empty((batch, heads, queries, stride), dtype=torch.float32)
        output = query.new_empty((batch, queries, heads, value_dim))
        arguments = _ARGUMENTS.pack(
            *(self.variant, threads(), batch, heads, key.shape[1], queries, length, query.shape[3], value_dim),
            *(_TYPES[query.dtype], _FORMATS[dtype]),
            *(query.data_ptr(), *query.stride()[:3]),
            *(key.data_ptr(), _FORMATS[key.dtype], *key.stride()[:3]),
            *(value.data_ptr(), _FORMATS[value.dtype], *value.stride()[:3]),
            *_scale_arguments(q_scale, query),
            *_scale_arguments(k_scale, key),
            *_scale_arguments(v_scale, value),
            0 if p_scale is None else p_scale.data_ptr(),
            0 if output_scale is None or dataflow != "fused" else output_scale.data_ptr(),
            *_mask_arguments(mask),
            *_sink_arguments(sinks),
            *(scores.data_ptr(), stride, output.data_ptr(), dataflow != "fused"),
            *(full_scale, scaling, softcap),
        )
        check(self.library.attention(arguments), "attention")
        return output

    def _codes(self, x: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype, full_scale: float) -> torch.Tensor:
        if x.dtype not in _FORMATS:
            by_head = scale.expand(*x.shape[:2], 1, 1) if scale.ndim == 3 else scale
            x = self.cast(x, by_head, dtype, full_scale)
        return x if x.stride(3) == 1 or x.shape[3] == 1 else x.contiguous()


def _packed_scale(scale: torch.Tensor) -> torch.Tensor:
    """A scale whose positions are neighbours, or that has one for all."""
    return scale.contiguous() if scale.ndim == 4 and scale.stride(2) != 1 else scale


def _scale_arguments(scale: torch.Tensor | None, x: torch.Tensor) -> tuple[int, ...]:
    if scale is None:
        return _NONE
    return (scale.data_ptr(), *scale.expand(*x.shape[:3], 1).stride()[:3])


def _expanded_mask(mask: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    mask = mask[..., : shape[3]]
    mask = mask if mask.stride(-1) == 1 else mask.contiguous()
    return mask.expand(shape)


def _mask_arguments(mask: torch.Tensor | None) -> tuple[int, ...]:
    if mask is None:
        return (0, 0, 0, 0, 0, 0)
    kind = _BOOLEAN if mask.dtype == torch.bool else _TYPES[mask.dtype]
    return (mask.data_ptr(), kind, mask.element_size(), *mask.stride()[:3])


def _sink_arguments(sinks: torch.Tensor | None) -> tuple[int, ...]:
    if sinks is None:
        return (0, 0, 0, 0, 0)
    strides = (0, sinks.stride(0), 0) if sinks.ndim == 1 else sinks.stride()[:3]
    return (sinks.data_ptr(), _TYPES[sinks.dtype], *strides)
