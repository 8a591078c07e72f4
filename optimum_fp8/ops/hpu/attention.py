"""Attention on Gaudi: in one kernel, `fp8_fused_sdpa`, where a fused dataflow is asked for and the kernel can, else in
steps (`attention_steps.py`); a record of calls tells why a fused dataflow was not in the kernel.

The kernel takes operands times s, the softmax's output times 1/s, all float32. It is called by keyword, since newer
bridges add arguments, and with recompute: only so it has an output in FP8. It lacks a soft cap, scales of heads or
tokens, operands that are not rounded; the bridge's function around it has no argument for sinks.
"""

from __future__ import annotations

from importlib import import_module

import torch

from ...formats import is_fp8
from ..arguments import AttentionCall
from ..compiling import constant_while_compiling
from ..constants import inverse_of
from ..reference_attention import FUSED
from . import attention_steps
from .bridge import full_scale, offers
from .casts import WIDE, codes_of, dequantize

_KERNELS, _FUSED = "habana_frameworks.torch.hpex.kernels", "fp8_fused_sdpa"

refuses = attention_steps.refuses


def slower(call: AttentionCall) -> str | None:
    """Why a call that asks for one kernel is computed in steps; None: it is in the kernel, or asks for steps."""
    reason = _not_in_the_kernel(call) if call.dataflow in FUSED else None
    return None if reason is None else f"in steps, not in the fused kernel: {reason}"


def run(call: AttentionCall) -> torch.Tensor:
    if call.dataflow not in FUSED or _not_in_the_kernel(call) is not None:
        return attention_steps.attention(call)
    return _in_the_kernel(call)


def _not_in_the_kernel(call: AttentionCall) -> str | None:
    """Why the kernel cannot compute a call that Gaudi's operators can."""
    query = call.query
    if query.dtype != torch.bfloat16 and call.output_scale is None:
        return f"queries in {query.dtype} without a scale of the output: the kernel's is in bfloat16"
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
        if not is_fp8(x.dtype) and x.dtype not in WIDE:
            return f"{name} in {x.dtype}"
    if call.p_scale is None:
        return "no scale of the probabilities"
    if call.softcap:
        return "a soft cap: the kernel has none"
    if call.sinks is not None:
        return f"sinks: {_FUSED} takes none"
    if call.mask is not None and call.mask.dtype not in (torch.bool, *WIDE):
        return f"a mask in {call.mask.dtype}"
    return None if _is_there() else f"there is no {_FUSED} in this bridge"


@constant_while_compiling
def _is_there() -> bool:
    return offers("fp8_sdpa_recomp_fwd") and hasattr(import_module(_KERNELS), _FUSED)


def _in_the_kernel(call: AttentionCall) -> torch.Tensor:
    from habana_frameworks.torch.hpex import kernels  # a statement, since compilers follow no call of import_module

    query, output_scale = call.query, call.output_scale
    q_scale, k_scale, v_scale, p_scale = call.q_scale, call.k_scale, call.v_scale, call.p_scale
    assert q_scale is not None and k_scale is not None and v_scale is not None and p_scale is not None  # or refused
    out, *_ = kernels.fp8_fused_sdpa(
        q=codes_of(query, q_scale, call.dtype, call.full_scale),
        k=codes_of(call.key, k_scale, call.dtype, call.full_scale),
        v=codes_of(call.value, v_scale, call.dtype, call.full_scale),
        attn_mask=additive(call.mask, query.dtype, call.key.shape[2]),
        dropout_p=0.0,
        is_causal=False,
        scale=call.scaling,
        softmax_mode="None",
        d_scale_q=q_scale,
        d_scale_k=k_scale,
        d_scale_v=v_scale,
        q_scale_s=inverse_of(p_scale),
        q_scale_o=None if output_scale is None else inverse_of(output_scale),
        d_scale_s=p_scale,
        is_amax_s=False,
        recompute=True,
    )
    if output_scale is not None:
        out = dequantize(out, output_scale, query.dtype)
    return out.transpose(1, 2).contiguous()


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
