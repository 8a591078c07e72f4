"""Attention on Gaudi as one kernel, `fp8_fused_sdpa`: operands times s, the softmax's output times 1/s, all float32.

The kernel is called by keyword, since newer bridges add arguments, and with recompute: only so it has an output in FP8.
What it lacks (soft cap, sinks, scales of heads or tokens, steps that are rounded in between) is refused.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch

from ...errors import FP8NotAvailableError
from ...formats import is_fp8
from ..arguments import AttentionCall
from ..reference_attention import FUSED
from .bridge import full_scale, offers
from .casts import WIDE, dequantize, quantize, refuses_full_scale

_KERNELS, _FUSED = "habana_frameworks.torch.hpex.kernels", "fp8_fused_sdpa"


def refuses(call: AttentionCall) -> str | None:
    query = call.query
    if call.dataflow not in FUSED:
        return f"dataflow {call.dataflow!r}"
    if query.dtype not in WIDE:
        return f"queries in {query.dtype}"
    if query.dtype != torch.bfloat16 and call.output_scale is None:
        return f"queries in {query.dtype} without a scale of the output: the kernel's is in bfloat16"
    if reason := refuses_full_scale(query, call.dtype, call.full_scale):
        return reason
    if call.output_scale is not None and call.full_scale < full_scale(call.dtype):
        return f"an output that saturates at {call.full_scale:g}: that of the kernel does at {full_scale(call.dtype):g}"
    operands = (
        ("queries", query, call.q_scale),
        ("keys", call.key, call.k_scale),
        ("values", call.value, call.v_scale),
    )
    for name, x, scale in operands:
        if scale is None:
            return f"{name} without a scale"
        if scale.numel() != 1:
            return f"scales of {name} of shape {tuple(scale.shape)}: the kernel takes one"
        if x.dtype != call.dtype and (is_fp8(x.dtype) or x.dtype not in WIDE):
            return f"{name} in {x.dtype}, of a kernel in {call.dtype}"
    if call.p_scale is None:
        return "no scale of the probabilities"
    if call.softcap:
        return "a soft cap: the kernel has none"
    if call.sinks is not None:
        return "sinks: the kernel takes none"
    if call.mask is not None and call.mask.dtype not in (torch.bool, *WIDE):
        return f"a mask in {call.mask.dtype}"
    return None


def run(call: AttentionCall) -> torch.Tensor:
    query, output_scale = call.query, call.output_scale
    q_scale, k_scale, v_scale, p_scale = call.q_scale, call.k_scale, call.v_scale, call.p_scale
    assert q_scale is not None and k_scale is not None and v_scale is not None and p_scale is not None  # or refused
    out, *_ = fused_kernel()(
        q=codes_of(query, q_scale, call),
        k=codes_of(call.key, k_scale, call),
        v=codes_of(call.value, v_scale, call),
        attn_mask=additive(call.mask, query.dtype, call.key.shape[2]),
        dropout_p=0.0,
        is_causal=False,
        scale=call.scaling,
        softmax_mode="None",
        d_scale_q=q_scale,
        d_scale_k=k_scale,
        d_scale_v=v_scale,
        q_scale_s=p_scale.reciprocal(),
        q_scale_o=None if output_scale is None else output_scale.reciprocal(),
        d_scale_s=p_scale,
        is_amax_s=False,
        recompute=True,
    )
    if output_scale is not None:
        out = dequantize(out, output_scale, query.dtype)
    return out.transpose(1, 2).contiguous()


def fused_kernel() -> Any:
    """`fp8_fused_sdpa` of the bridge.

    Raises:
        FP8NotAvailableError: the bridge has none.
    """
    kernel = getattr(import_module(_KERNELS), _FUSED, None) if offers("fp8_sdpa_recomp_fwd") else None
    if kernel is None:
        raise FP8NotAvailableError(
            f"{_KERNELS}.{_FUSED} is not in this bridge: install a newer release of Intel Gaudi's software, or set "
            "attention_dataflow='unfused'"
        )
    return kernel


def codes_of(x: torch.Tensor, scale: torch.Tensor, call: AttentionCall) -> torch.Tensor:
    """`x` in FP8: as it is, if it is the codes of a cache, else rounded with its scale."""
    return x if is_fp8(x.dtype) else quantize(x, scale, call.dtype, call.full_scale)


def additive(mask: torch.Tensor | None, dtype: torch.dtype, positions: int) -> torch.Tensor | None:
    """A mask `[B or 1, H or 1, S, positions]` that is added to scores; what a boolean one forbids is the least value of
    `dtype`."""
    if mask is None:
        return None
    mask = mask[(None,) * (4 - mask.ndim)][..., :positions]
    if mask.dtype != torch.bool:
        return mask
    zeros = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
    return zeros.masked_fill(~mask, torch.finfo(dtype).min)
