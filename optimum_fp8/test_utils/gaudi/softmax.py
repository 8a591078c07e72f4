"""Softmax with FP8 in and out: `softmax_fp8`."""

from __future__ import annotations

import torch
from torch import Tensor

from .calls import Arguments
from .codes import E4M3
from .device import Device
from .refuse import one_element, require, require_dtype, require_one_element


def _require_fused_add(a: Arguments) -> None:
    """Refuse an addend that is not of the input's first and last size, with the others one or equal."""
    require(a.input_scale is not None, "FusedAdd available only for Float8 output, but input scale is not given.")
    require_dtype(a.fused_add, (torch.bfloat16,), "Input fused_add dtype")
    rank, added = a.input.dim(), a.fused_add.shape
    require(rank == len(added), "FusedAdd tensor must have the same rank as the input tensor")
    require(
        added[0] == a.input.shape[0] and added[-1] == a.input.shape[-1],
        "FusedAdd tensor must have the same first and last dim as the input tensor",
    )
    require(
        all(added[i] in (1, a.input.shape[i]) for i in range(1, rank - 1)),
        "FusedAdd tensor's dim other than first and last should be equal to 1 or the same as the input tensor",
    )


def check_softmax(a: Arguments, device: Device) -> Tensor:
    require(
        a.input.dtype in (torch.bfloat16, E4M3),
        "Input tensor must be of torch.bfloat16 or torch.float8_e4m3fn dtype.",
    )
    require(-a.input.dim() <= a.dim < a.input.dim(), f"softmax_fp8: there is no dimension {a.dim}")
    require((a.input_scale is None) == (a.output_scale is None), "Output and input scales must be both given or None")
    require(
        a.input.dtype != E4M3 or a.input_scale is not None,
        "If Input is of torch.float8_e4m3fn dtype then input scale must be given.",
    )
    for what in ("input_scale", "output_scale", "inv_attn_heads"):
        require_one_element(getattr(a, what), f"softmax_fp8: {what}", (torch.float32,))
    if a.fused_add is not None:
        _require_fused_add(a)
    return a.input.new_empty(a.input.shape, dtype=torch.bfloat16 if a.input_scale is None else E4M3)


def softmax(a: Arguments, device: Device) -> Tensor:
    """softmax(input * inv_attn_heads * s_in + fused_add) * (1/s_out), in float32; with scales to E4M3, else bf16."""
    x = device.decode(a.input) if a.input.dtype == E4M3 else a.input.float()
    x = x * one_element(a.inv_attn_heads) * one_element(a.input_scale)
    if a.fused_add is not None:
        x = x + a.fused_add.float()
    y = torch.softmax(x, a.dim)
    return y.to(torch.bfloat16) if a.output_scale is None else device.encode(y * one_element(a.output_scale), E4M3)
