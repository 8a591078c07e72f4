"""`fp8_fused_sdpa` and `FusedSDPA` of `habana_frameworks.torch.hpex.kernels`, as callers see them; inference only."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .device import BRIDGES, Device
from .refuse import require


def _is_grouped(q: Tensor, k: Tensor) -> bool:
    """Whether several query heads share each of several key heads; one key head broadcasts by itself."""
    return q.dim() == 4 and q.shape[1] != k.shape[1] and k.shape[1] != 1


def _grouped(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Heads as [groups, heads of a group]."""
    groups, shared = k.shape[1], q.shape[1] // k.shape[1]
    require(shared * groups == q.shape[1], f"FusedSDPA: {q.shape[1]} heads do not share {groups} key heads evenly")
    if mask is not None:
        mask = mask.unflatten(1, (groups, shared)) if mask.shape[1] == q.shape[1] else mask.unsqueeze(1)
    return q.unflatten(1, (groups, shared)), k.unsqueeze(2), v.unsqueeze(2), mask


def _arguments(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float, scale: float | None, is_causal: bool
) -> tuple[tuple[Any, ...], bool]:
    """The first arguments of all operators, and whether heads were grouped."""
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    grouped = _is_grouped(q, k)
    tensors = _grouped(q, k, v, mask) if grouped else (q, k, v, mask)
    return (*tensors, dropout, scale, is_causal), grouped


def _window(device: Device, window_size: Any, sinks: Tensor | None) -> tuple[Any, ...]:
    """The arguments that newer bridges add."""
    if device.bridge == BRIDGES[0]:
        require(window_size is None and sinks is None, f"FusedSDPA: no window and no sinks in bridge {device.bridge}")
        return ()
    return (list(window_size or (-1, -1)), sinks)


def _require_inference(*tensors: Tensor) -> None:
    require(
        not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)),
        "FusedSDPA: only inference is emulated: use torch.no_grad()",
    )


def _fp8_function(device: Device) -> Callable[..., Any]:
    newer = device.bridge != BRIDGES[0]

    def fp8_fused_sdpa(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        softmax_mode: str = "None",
        d_scale_q: Tensor | None = None,
        d_scale_k: Tensor | None = None,
        d_scale_v: Tensor | None = None,
        q_scale_s: Tensor | None = None,
        q_scale_o: Tensor | None = None,
        d_scale_s: Tensor | None = None,
        is_amax_s: bool = False,
        is_amax_o: bool = False,
        valid_seq_len: Tensor | None = None,
        seq_padding_type: str = "left",
        recompute: bool | None = None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Attention with scales: the output, and the largest probability and output where they are asked for."""
        _require_inference(q, k, v)
        mode, last = softmax_mode.lower(), (valid_seq_len, seq_padding_type.lower())
        require(not (newer and mode == "fp32"), "softmax_mode == fp32 is not supported in fp8 flow")
        if newer:
            recompute = True  # what the caller says counts in training
        elif recompute is None:
            recompute = device.recompute_sdp
        head, grouped = _arguments(q, k, v, attn_mask, dropout_p, scale, is_causal)
        scales = (d_scale_q, d_scale_k, d_scale_v, q_scale_s, q_scale_o, d_scale_s)
        amax_o = None
        if recompute:
            rest = (*scales, is_amax_s, is_amax_o, *last, *_window(device, None, None))
            out, _, _, _, amax_s, amax_o = torch.ops.hpu.fp8_sdpa_recomp_fwd(*head, False, mode, *rest)
        else:
            out, _, _, amax_s = torch.ops.hpu.fp8_sdpa_fwd(*head, mode, *scales, is_amax_s, *last)
        return out.flatten(1, 2) if grouped else out, amax_s, amax_o

    return fp8_fused_sdpa


def _plain_class(device: Device) -> type:
    class FusedSDPA:
        """Attention without scales."""

        @staticmethod
        def apply(
            query: Tensor,
            key: Tensor,
            value: Tensor,
            attn_mask: Tensor | None = None,
            dropout_p: float = 0.0,
            is_causal: bool = False,
            scale: float | None = None,
            softmax_mode: str = "None",
            recompute: bool | None = None,
            valid_seq_len: Tensor | None = None,
            seq_padding_type: str = "left",
            return_dropout_mask: bool = False,
            return_attn_probs: bool = False,
            window_size: Any = None,
            sinks: Tensor | None = None,
        ) -> Tensor:
            _require_inference(query, key, value)
            require(not (return_dropout_mask or return_attn_probs), "FusedSDPA: only the output is emulated")
            head, grouped = _arguments(query, key, value, attn_mask, dropout_p, scale, is_causal)
            rest = (valid_seq_len, seq_padding_type.lower(), *_window(device, window_size, sinks))
            out = torch.ops.hpu.sdpa_recomp_fwd(*head, False, softmax_mode.lower(), *rest)[0]
            return out.flatten(1, 2) if grouped else out

    return FusedSDPA


def fused_kernels(device: Device) -> dict[str, Any]:
    """What `habana_frameworks.torch.hpex.kernels` has."""
    return {"fp8_fused_sdpa": _fp8_function(device), "FusedSDPA": _plain_class(device)}
