"""Attention's operators, declared: whole attention, its probabilities alone, and a product of two activations.

`reference_attention.py` says where each of them rounds. Keys, values and the operands of `matmul` may be FP8 codes
(their scale is needed then), or in high precision: those are rounded to FP8 with their scale, or left as they are
without one.
"""

from __future__ import annotations

from typing import Any

import torch

from . import reference_attention
from .declare import call, declare

_OPERANDS = "Tensor? mask, Tensor? sinks, float scaling, float softcap, ScalarType dtype, float full_scale, "
_SCHEMAS = {
    "attention": "(Tensor query, Tensor key, Tensor value, Tensor? q_scale, Tensor? k_scale, Tensor? v_scale, "
    f"Tensor? p_scale, Tensor? output_scale, {_OPERANDS}str dataflow, int owner) -> Tensor",
    "attention_weights": "(Tensor query, Tensor key, Tensor? q_scale, Tensor? k_scale, Tensor? p_scale, "
    f"{_OPERANDS}str dataflow, int owner) -> Tensor",
    "matmul": "(Tensor a, Tensor b, Tensor? a_scale, Tensor? b_scale, ScalarType dtype, float full_scale, "
    "str arithmetic, int owner) -> Tensor",
}


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    q_scale: torch.Tensor | None,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
    p_scale: torch.Tensor | None,
    output_scale: torch.Tensor | None,
    mask: torch.Tensor | None,
    *,
    sinks: torch.Tensor | None = None,
    scaling: float,
    softcap: float = 0.0,
    dtype: torch.dtype,
    full_scale: float,
    dataflow: str = "fused",
    owner: int = 0,
) -> torch.Tensor:
    """softmax(softcap(q kᵀ · scaling) + mask) v with FP8 operands and float32 accumulation.

    Args:
        query: `[B, H, S, D]`, high precision.
        key: `[B, Hkv, T, D]`, high precision or FP8 codes; H is a multiple of Hkv.
        value: `[B, Hkv, T, Dv]`, high precision or FP8 codes.
        q_scale: float32 `(1,)`, `(H, 1, 1)` or `[B, H, S, 1]`; None leaves the query in high precision.
        k_scale: float32 `(1,)`, `(Hkv, 1, 1)` or `[B, Hkv, T, 1]`; None leaves a high-precision key as it is.
        v_scale: the same for the value.
        p_scale: float32 `(1,)`, the scale of the softmax's output; None leaves it in high precision.
        output_scale: float32 `(1,)`; the result is rounded to FP8 with it ("fused" only).
        mask: `[B or 1, H or 1, S, T]`, added to the scores, or boolean (True: attend); None: nothing is masked.
        sinks: `(H,)` or `[B, H, S, 1]`, scores that take part in the softmax and have no value.
        scaling: what scores are multiplied with (unitless).
        softcap: scores become softcap · tanh(scores / softcap); 0: they do not.
        dtype: the FP8 dtype that is rounded to.
        full_scale: the value casts saturate at.
        dataflow: one of `DATAFLOWS`.
        owner: the number calls are counted under.

    Returns:
        `[B, S, H, Dv]`, contiguous, in the query's dtype.

    Raises:
        FP8ScaleError: FP8 codes without their scale.
        FP8ConfigError: an unknown dataflow.
    """
    scales = (q_scale, k_scale, v_scale, p_scale, output_scale)
    rest = (mask, sinks, scaling, softcap, dtype, full_scale, dataflow)
    return call("attention", owner, query, key, value, *scales, *rest)


def attention_weights(
    query: torch.Tensor,
    key: torch.Tensor,
    q_scale: torch.Tensor | None,
    k_scale: torch.Tensor | None,
    p_scale: torch.Tensor | None,
    mask: torch.Tensor | None,
    *,
    sinks: torch.Tensor | None = None,
    scaling: float,
    softcap: float = 0.0,
    dtype: torch.dtype,
    full_scale: float,
    dataflow: str = "fused",
    owner: int = 0,
) -> torch.Tensor:
    """The softmax's output as `attention` multiplies it with the value: `[B, H, S, T]` in the query's dtype."""
    rest = (mask, sinks, scaling, softcap, dtype, full_scale, dataflow)
    return call("attention_weights", owner, query, key, q_scale, k_scale, p_scale, *rest)


def matmul(
    a: torch.Tensor,
    b: torch.Tensor,
    a_scale: torch.Tensor | None,
    b_scale: torch.Tensor | None,
    *,
    dtype: torch.dtype,
    full_scale: float,
    arithmetic: str = "fused",
    owner: int = 0,
) -> torch.Tensor:
    """torch.matmul of two activations, each rounded to FP8, accumulated in float32 and rounded once.

    Args:
        a: `[…, M, K]`, bfloat16, float16 or float32.
        b: `[…, K, N]`, high precision or FP8 codes.
        a_scale: float32 `(1,)` or `[…, M, 1]`; None leaves `a` in high precision.
        b_scale: float32 `(1,)`, `[…, 1, N]`, or `[…, K, 1]` (cached values: one a position); None leaves `b` in high
            precision.
        dtype: the FP8 dtype that is rounded to.
        full_scale: the value casts saturate at.
        arithmetic: "qdq" multiplies dequantized operands in their own dtype; "fused" and "gaudi" are the same here.
        owner: the number calls are counted under.

    Returns:
        `[…, M, N]` in `a`'s dtype.
    """
    return call("matmul", owner, a, b, a_scale, b_scale, dtype, full_scale, arithmetic)


def _fake_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *rest: Any) -> torch.Tensor:
    batch, heads, length, _ = query.shape
    return query.new_empty((batch, length, heads, value.shape[-1]))


def _fake_weights(query: torch.Tensor, key: torch.Tensor, *rest: Any) -> torch.Tensor:
    return query.new_empty((*query.shape[:3], key.shape[2]))


def _fake_matmul(a: torch.Tensor, b: torch.Tensor, *rest: Any) -> torch.Tensor:
    return torch.matmul(a, b.to(a.dtype))


_FAKES = {"attention": _fake_attention, "attention_weights": _fake_weights, "matmul": _fake_matmul}

for _op, _schema in _SCHEMAS.items():
    declare(_op, _schema, _FAKES[_op], getattr(reference_attention, _op), counted=True)
