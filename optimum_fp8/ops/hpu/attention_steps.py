"""Attention on Gaudi in steps: product, softmax, product. They serve every dataflow, and all layouts of scales.

Where both operands of a product are rounded, and no scale changes along what is summed over, it is one of codes
(`fp8_gemm_v2`); else codes are dequantized and the product is one of float32 (`matmul.py`). Heads that share keys are
rows of one product. A fused dataflow leaves float32 between the steps, the others the query's dtype. Scaling, soft cap,
mask and sinks are the reference's own, before the softmax: so that its input is rounded where the reference's is.

Probabilities that are rounded once, of scores in bfloat16, are `softmax_fp8`'s, which is given 1/s; else the softmax is
torch's in float32, and a cast follows.
"""

from __future__ import annotations

import torch

from ...formats import FP8_DTYPES, is_fp8
from ..arguments import AttentionCall, AttentionWeightsCall, MatmulCall, SoftmaxCall
from ..constants import constant_of, inverse_of
from ..operands import HIGH_PRECISION
from ..reference_attention import DATAFLOWS, FUSED, rounds_probabilities, softmax_input
from .bridge import full_scale, operator
from .casts import codes_of, dequantize, quantize, refuses_full_scale
from .matmul import product


def refuses(call: AttentionCall | AttentionWeightsCall) -> str | None:
    query = call.query
    if query.dtype not in HIGH_PRECISION:
        return f"queries in {query.dtype}"
    if call.dataflow not in DATAFLOWS:
        return f"dataflow {call.dataflow!r}"
    operands = [("queries", query, call.q_scale), ("keys", call.key, call.k_scale)]
    single = [("probabilities", call.p_scale)]
    if isinstance(call, AttentionCall):
        operands.append(("values", call.value, call.v_scale))
        single.append(("the output", call.output_scale))
    for name, x, scale in operands:
        if reason := _refuses_operand(call, x, scale):
            return f"{name} {reason}"
    for name, scale in single:
        if scale is not None and scale.numel() != 1:
            return f"scales of {name} of shape {tuple(scale.shape)}: expected one"
    return refuses_full_scale(query, call.dtype, call.full_scale)


def _refuses_operand(
    call: AttentionCall | AttentionWeightsCall, x: torch.Tensor, scale: torch.Tensor | None
) -> str | None:
    if x.dtype not in HIGH_PRECISION and x.dtype != call.dtype:
        return f"in {x.dtype}"
    if scale is None:
        if is_fp8(x.dtype):
            return "that are codes without their scale"
        return f"in {x.dtype}" if call.dataflow == "qdq" and x.dtype != call.query.dtype else None
    by_head_or_row = scale.shape in ((x.shape[1], 1, 1), (*x.shape[:3], 1))
    return None if scale.numel() == 1 or by_head_or_row else f"with scales of {tuple(scale.shape)}"


def attention(call: AttentionCall) -> torch.Tensor:
    query, output_scale = call.query, call.output_scale if call.dataflow in FUSED else None
    probabilities, dtype = _probabilities(call), query.dtype if output_scale is None else torch.float32
    output = _by_head(call, _product(call, probabilities, call.value, call.p_scale, call.v_scale, dtype))
    if output_scale is not None:
        codes = quantize(output, output_scale, call.dtype, call.full_scale)
        output = dequantize(codes, output_scale, query.dtype)
    return output.transpose(1, 2).contiguous()


def attention_weights(call: AttentionWeightsCall) -> torch.Tensor:
    probabilities, dtype = _by_head(call, _probabilities(call)), call.query.dtype
    if call.p_scale is not None:
        probabilities = dequantize(probabilities, call.p_scale, dtype)
    return probabilities.to(dtype).contiguous()


def _probabilities(call: AttentionCall | AttentionWeightsCall) -> torch.Tensor:
    """What is multiplied with values, `[B, Hkv, H / Hkv · S, T]`: codes if they have a scale, else in float32 or the
    query's dtype."""
    query, q_scale, k_scale, p_scale = call.query, call.q_scale, call.k_scale, call.p_scale
    heads, shared = call.key.shape[1], query.shape[1] // call.key.shape[1]
    queries, keys = _rounded(call, query, q_scale), _rounded(call, call.key, k_scale)
    rows = queries.reshape(query.shape[0], heads, -1, query.shape[3])
    if q_scale is not None and q_scale.numel() > 1:  # by head or by row
        q_scale = q_scale.expand(*q_scale.shape[:-2], query.shape[2], 1).unflatten(-3, (heads, shared)).flatten(-3, -2)
    if k_scale is not None and k_scale.numel() > 1:
        k_scale = k_scale.mT
    dtype = torch.float32 if call.dataflow in FUSED else query.dtype
    scores = _product(call, rows, keys.mT, q_scale, k_scale, dtype)
    scores = softmax_input(scores.unflatten(2, (shared, query.shape[2])), call)
    return _softmax(call, scores, p_scale)[..., : call.key.shape[2]].flatten(2, 3)


def _softmax(
    call: AttentionCall | AttentionWeightsCall, scores: torch.Tensor, p_scale: torch.Tensor | None
) -> torch.Tensor:
    if p_scale is not None and _is_rounded_by_the_softmax(call, scores):
        return _rounding_softmax(scores, p_scale)
    probabilities = scores.float().softmax(dim=-1)
    if rounds_probabilities(call.dataflow, p_scale):
        probabilities = probabilities.to(call.query.dtype)
    return probabilities if p_scale is None else quantize(probabilities, p_scale, call.dtype, call.full_scale)


def _is_rounded_by_the_softmax(call: AttentionCall | AttentionWeightsCall, scores: torch.Tensor) -> bool:
    once = call.dataflow == "unfused_gaudi"
    return once and _is_of_the_operator(scores, call.dtype, call.full_scale)


def _is_of_the_operator(x: torch.Tensor, dtype: torch.dtype, saturates_at: float) -> bool:
    """Whether `softmax_fp8` takes `x` and gives such codes: from bfloat16 to E4M3, up to the card's largest."""
    return x.dtype == torch.bfloat16 and dtype == FP8_DTYPES["E4M3"] and saturates_at == full_scale(dtype)


def _rounding_softmax(
    x: torch.Tensor, scale: torch.Tensor, factor: torch.Tensor | None = None, dim: int = -1
) -> torch.Tensor:
    """Codes of the softmax of x · factor."""
    if (constant := constant_of(scale)) is not None:
        return operator("softmax_fp8", "Scalar_scales")(x, dim, 1.0, 1.0 / constant, factor)
    return operator("softmax_fp8")(x, dim, torch.ones_like(scale), inverse_of(scale), factor)


def refuses_softmax(call: SoftmaxCall) -> str | None:
    if call.x.dtype not in HIGH_PRECISION:
        return f"a softmax of {call.x.dtype}"
    if call.scale.numel() != 1:
        return f"scales of shape {tuple(call.scale.shape)}: expected one"
    return refuses_full_scale(call.x, call.dtype, call.full_scale)


def softmax(call: SoftmaxCall) -> torch.Tensor:
    x, scale, factor = call.x, call.scale, call.factor
    if _is_of_the_operator(x, call.dtype, call.full_scale):
        return dequantize(_rounding_softmax(x, scale, factor, call.dim), scale, x.dtype)
    wide = x.float() if factor is None else x.float() * factor
    return dequantize(quantize(wide.softmax(call.dim), scale, call.dtype, call.full_scale), scale, x.dtype)


def _rounded(call: AttentionCall | AttentionWeightsCall, x: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    return x if scale is None else codes_of(x, scale, call.dtype, call.full_scale)


def _product(
    call: AttentionCall | AttentionWeightsCall,
    a: torch.Tensor,
    b: torch.Tensor,
    a_scale: torch.Tensor | None,
    b_scale: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    arithmetic = "qdq" if call.dataflow == "qdq" else "gaudi"
    return product(MatmulCall(a, b, a_scale, b_scale, call.dtype, call.full_scale, arithmetic), dtype)


def _by_head(call: AttentionCall | AttentionWeightsCall, rows: torch.Tensor) -> torch.Tensor:
    """`[B, Hkv, H / Hkv · S, …]` as `[B, H, S, …]`."""
    return rows.unflatten(2, (-1, call.query.shape[2])).flatten(1, 2)
