"""Convolutions of FP8 images: `conv2d_fp8`."""

from __future__ import annotations

import torch
from torch import Tensor

from .calls import Arguments
from .device import Device
from .refuse import FP8, HIGH, one_element, require, require_dtype, require_one_element


def _pair(values: list[int], what: str) -> tuple[int, int]:
    require(len(values) in (1, 2), f"conv2d_fp8: {what} takes one or two numbers, but got {list(values)}")
    return (values[0], values[-1])


def _geometry(a: Arguments) -> list[tuple[int, int]]:
    return [_pair(getattr(a, what), what) for what in ("stride", "padding", "dilation")]


def check_conv(a: Arguments, device: Device) -> Tensor:
    require_dtype(a.input, FP8, "conv2d_fp8: dtype of input")
    require_dtype(a.weight, FP8, "conv2d_fp8: dtype of weight")
    require(a.input.dim() == 4 and a.weight.dim() == 4, "Input and weight must be 4D tensors")
    require(
        a.input.shape[1] == a.weight.shape[1] * a.groups and a.weight.shape[0] % a.groups == 0,
        f"conv2d_fp8: {a.groups} groups of a weight of shape {tuple(a.weight.shape)} do not fit "
        f"{a.input.shape[1]} input channels",
    )
    if a.bias is not None:
        require(
            a.bias.dim() == 1 and a.bias.shape[0] == a.weight.shape[0],
            "Bias must be 1D tensor with size equal to weight dim0",
        )
    require_one_element(a.scale_input, "conv2d_fp8: scale_input")
    require_one_element(a.scale_weight, "conv2d_fp8: scale_weight")
    out_dtype = a.out_dtype or torch.bfloat16
    require(out_dtype in HIGH, f"conv2d_fp8: out_dtype must be one of {[*HIGH]}, but is {out_dtype}")
    sizes = [
        (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
        for size, kernel, stride, padding, dilation in zip(
            a.input.shape[2:], a.weight.shape[2:], *_geometry(a), strict=True
        )
    ]
    require(all(size > 0 for size in sizes), f"conv2d_fp8: the output would have size {sizes}")
    return a.input.new_empty((a.input.shape[0], a.weight.shape[0], *sizes), dtype=out_dtype)


def conv(a: Arguments, device: Device) -> Tensor:
    """conv(input, weight) * (s_input * s_weight), rounded to the output's dtype; then the bias is added in it."""
    out_dtype = a.out_dtype or torch.bfloat16
    stride, padding, dilation = _geometry(a)
    image, weight = device.decode(a.input), device.decode(a.weight)
    product = torch.conv2d(image, weight, None, stride, padding, dilation, a.groups)
    out = (product * (one_element(a.scale_input) * one_element(a.scale_weight))).to(out_dtype)
    return out if a.bias is None else (out.float() + a.bias.float()[:, None, None]).to(out_dtype)
