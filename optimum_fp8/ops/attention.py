"""Attention, its probabilities alone, and its steps (a product of two activations, a softmax): schemas, fake kernels,
functions to call.

`reference_attention.py` says where each of them rounds. Keys, values and the operands of `matmul` may be FP8 codes
(their scale is needed then), or in high precision: those are rounded to FP8 with their scale, or left as they are
without one.
"""

from __future__ import annotations

import torch

from . import reference_attention
from .arguments import AttentionCall, AttentionWeightsCall, MatmulCall, SoftmaxCall
from .declare import call, declare
from .records import CallRecord


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
    record: CallRecord | None = None,
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
        record: counts the call for the module that makes it.

    Returns:
        `[B, S, H, Dv]`, contiguous, in the query's dtype.

    Raises:
        FP8ScaleError: FP8 codes without their scale.
        FP8ConfigError: an unknown dataflow.
    """
    scales = (q_scale, k_scale, v_scale, p_scale, output_scale)
    options = (scaling, softcap, dtype, full_scale, dataflow)
    return call("attention", AttentionCall(query, key, value, *scales, mask, sinks, *options), record)


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
    record: CallRecord | None = None,
) -> torch.Tensor:
    """The softmax's output as `attention` multiplies it with the value: `[B, H, S, T]` in the query's dtype."""
    operands, options = (query, key, q_scale, k_scale, p_scale), (scaling, softcap, dtype, full_scale, dataflow)
    return call("attention_weights", AttentionWeightsCall(*operands, mask, sinks, *options), record)


def matmul(
    a: torch.Tensor,
    b: torch.Tensor,
    a_scale: torch.Tensor | None,
    b_scale: torch.Tensor | None,
    *,
    dtype: torch.dtype,
    full_scale: float,
    arithmetic: str = "fused",
    record: CallRecord | None = None,
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
        record: counts the call for the module that makes it.

    Returns:
        `[…, M, N]` in `a`'s dtype.
    """
    return call("matmul", MatmulCall(a, b, a_scale, b_scale, dtype, full_scale, arithmetic), record)


def softmax(
    x: torch.Tensor,
    scale: torch.Tensor,
    factor: torch.Tensor | None = None,
    *,
    dim: int = -1,
    dtype: torch.dtype,
    full_scale: float,
    record: CallRecord | None = None,
) -> torch.Tensor:
    """softmax(x · factor) in float32, rounded once: to FP8, as a softmax that gives FP8 rounds, and back.

    Args:
        x: bfloat16, float16 or float32, of any shape.
        scale: float32 `(1,)`, the scale of the result.
        factor: float32, of one element; None: 1.
        dim: the dimension that sums to 1.
        dtype: the FP8 dtype that is rounded to.
        full_scale: the value casts saturate at.
        record: counts the call for the module that makes it.

    Returns:
        what the codes stand for, `x`'s shape, in its dtype.
    """
    return call("softmax", SoftmaxCall(x, scale, factor, dim, dtype, full_scale), record)


def _fake_attention(call: AttentionCall) -> torch.Tensor:
    batch, heads, length, _ = call.query.shape
    return call.query.new_empty((batch, length, heads, call.value.shape[-1]))


def _fake_weights(call: AttentionWeightsCall) -> torch.Tensor:
    return call.query.new_empty((*call.query.shape[:3], call.key.shape[2]))


def _fake_matmul(call: MatmulCall) -> torch.Tensor:
    return torch.matmul(call.a, call.b.to(call.a.dtype))


def _fake_softmax(call: SoftmaxCall) -> torch.Tensor:
    return call.x.new_empty(call.x.shape)


_OPTIONS = "Tensor? mask, Tensor? sinks, float scaling, float softcap, ScalarType dtype, float full_scale, str dataflow"

declare(
    "attention",
    "(Tensor query, Tensor key, Tensor value, Tensor? q_scale, Tensor? k_scale, Tensor? v_scale, Tensor? p_scale, "
    f"Tensor? output_scale, {_OPTIONS}) -> Tensor",
    AttentionCall,
    _fake_attention,
    reference_attention.attention,
    attributed_by=("p_scale", "q_scale", "k_scale", "v_scale"),
    gradient=("query", "key", "value", "mask", "sinks"),
)
declare(
    "attention_weights",
    f"(Tensor query, Tensor key, Tensor? q_scale, Tensor? k_scale, Tensor? p_scale, {_OPTIONS}) -> Tensor",
    AttentionWeightsCall,
    _fake_weights,
    reference_attention.attention_weights,
    attributed_by=("p_scale", "q_scale", "k_scale"),
    gradient=("query", "key", "mask", "sinks"),
)
declare(
    "matmul",
    "(Tensor a, Tensor b, Tensor? a_scale, Tensor? b_scale, ScalarType dtype, float full_scale, str arithmetic) "
    "-> Tensor",
    MatmulCall,
    _fake_matmul,
    reference_attention.matmul,
    attributed_by=("a_scale", "b_scale"),
    gradient=("a", "b"),
)
declare(
    "softmax",
    "(Tensor x, Tensor scale, Tensor? factor, int dim, ScalarType dtype, float full_scale) -> Tensor",
    SoftmaxCall,
    _fake_softmax,
    reference_attention.softmax,
    attributed_by=("scale",),
    gradient=("x",),
)
