"""Products of FP8 matrices: `fp8_gemm_v2` and its older form `fp8_gemm`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .calls import Arguments
from .device import Device
from .refuse import FP8, HIGH, require, require_broadcast, require_dtype, shaped_scale

BLOCKWISE_SINCE = "1.24"
BLOCKS = "For per-block scaling, supported blocks configurations are: 1xN @ NxN, NxN @ Nx1, NxN @ NxN."


def _operand(x: Tensor, transposed: bool, vector_dim: int) -> Tensor:
    """An operand as a matrix, or a batch of them; a vector becomes a row (A) or a column (B)."""
    if transposed:
        require(x.dim() >= 2, "Input tensor must have at least 2 dimensions to perform transpose operation.")
        return x.transpose(-1, -2)
    return x.unsqueeze(vector_dim) if x.dim() == 1 else x


def _operands(a: Arguments) -> tuple[Tensor, Tensor]:
    return _operand(a.A, a.trans_A, 0), _operand(a.B, a.trans_B, 1)


def _output_shape(a: Arguments) -> tuple[int, ...]:
    """As of torch.matmul, of operands of any number of dimensions."""
    left, right = _operands(a)
    require(
        left.shape[-1] == right.shape[-2],
        f"fp8_gemm: cannot multiply {tuple(left.shape)} by {tuple(right.shape)}",
    )
    rows = () if a.A.dim() == 1 else (left.shape[-2],)
    columns = () if a.B.dim() == 1 else (right.shape[-1],)
    return (*torch.broadcast_shapes(left.shape[:-2], right.shape[:-2]), *rows, *columns)


def _scales(a: Arguments) -> tuple[Tensor | None, Tensor | None]:
    return shaped_scale(a.A_scale_inv, None, a.A), shaped_scale(a.B_scale_inv, a.get("B_scale_shape"), a.B)


def _follows_output(scale: Tensor | None, operand: Tensor, contracted: int) -> bool:
    """Whether a scale can be multiplied after the product: one element, or one along the contracted dimension."""
    if scale is None or scale.numel() == 1:
        return True
    shape = [*operand.shape]
    shape[contracted] = 1
    trailing = shape[len(shape) - scale.dim() :] if scale.dim() <= len(shape) else None
    return trailing is not None and all(s in (1, n) for s, n in zip(scale.shape, trailing, strict=True))


def _block(operand: Tensor, scale: Tensor | None, what: str) -> tuple[int, int]:
    """Height and width of the blocks that have a scale of their own."""
    shape = (1, 1) if scale is None else (1, 1, *scale.shape)[-2:]
    divides = operand.shape[-2] % shape[0] == 0 and operand.shape[-1] % shape[1] == 0
    require(
        divides,
        f"For per-block scaling, the last two dimensions of the input {what} {tuple(operand.shape[-2:])} must be "
        f"divisible by the last two dimensions of scale {what} {tuple(shape)}.",
    )
    return operand.shape[-2] // shape[0], operand.shape[-1] // shape[1]


def _require_blocks(a: Arguments, device: Device, scales: tuple[Tensor | None, Tensor | None]) -> None:
    """Refuse scales that fit neither the output's rows and columns nor, on newer bridges, blocks of the operands."""
    given = [None if scale is None else tuple(scale.shape) for scale in scales]
    left, right = _operands(a)
    require(
        device.bridge >= BLOCKWISE_SINCE,
        f"fp8_gemm_v2: scales of shapes {given} do not broadcast over the product of {tuple(left.shape)} and "
        f"{tuple(right.shape)}: along the contracted dimension a scale has size one.",
    )
    rows, inner = _block(left, scales[0], "A")
    also_inner, columns = _block(right, scales[1], "B")
    fits = inner == also_inner and rows in (inner, 1) and columns in (inner, 1) and rows * columns != 1
    require(fits, f"{BLOCKS} Got: {rows}x{inner} @ {also_inner}x{columns}.")


def _is_blockwise(a: Arguments, scales: tuple[Tensor | None, Tensor | None]) -> bool:
    left, right = _operands(a)
    return not (_follows_output(scales[0], left, -1) and _follows_output(scales[1], right, -2))


def check_gemm(a: Arguments, device: Device) -> Tensor:
    require_dtype(a.A, FP8, "fp8_gemm: dtype of A")
    require_dtype(a.B, FP8, "fp8_gemm: dtype of B")
    require(a.out_dtype in HIGH, f"fp8_gemm: out_dtype must be one of {[*HIGH]}, but is {a.out_dtype}")
    shape = _output_shape(a)
    scales = _scales(a)
    if _is_blockwise(a, scales):
        _require_blocks(a, device, scales)
    if a.bias is not None:
        require_dtype(a.bias, HIGH, "fp8_gemm: dtype of bias")
        require_broadcast(a.bias, shape, "fp8_gemm: bias")
    if a.accumulate:
        require(
            a.D is not None,
            "Accumulation tensor must be provided at index 4 for Fp8GemmV2, when accumulate is true",
        )
        require(tuple(a.D.shape) == shape, f"fp8_gemm: D has shape {tuple(a.D.shape)}, the output {shape}")
        require_dtype(a.D, HIGH, "fp8_gemm: dtype of D")
    return a.A.new_empty(shape, dtype=a.out_dtype)


def _spread(scale: Tensor | None, operand: Tensor) -> Any:
    """A scale for each element of an operand, from one for each block."""
    if scale is None:
        return 1.0
    scale = scale.reshape((1,) * max(0, 2 - scale.dim()) + tuple(scale.shape))
    for dim in (-1, -2):
        scale = scale.repeat_interleave(operand.shape[dim] // scale.shape[dim], dim)
    return scale


def _product(a: Arguments, device: Device) -> Tensor:
    """(A @ B) * (s_A * s_B) in float32, vectors still as matrices."""
    left, right = (device.decode(operand) for operand in _operands(a))
    scales = _scales(a)
    if _is_blockwise(a, scales):
        return torch.matmul(left * _spread(scales[0], left), right * _spread(scales[1], right))
    product = torch.matmul(left, right)
    left_scale, right_scale = (torch.ones(()) if scale is None else scale for scale in scales)
    return (product * (left_scale * right_scale)).reshape(product.shape)


def gemm(a: Arguments, device: Device) -> Tensor:
    """The product is rounded to the output's dtype; then bias and D are added in it, one by one."""
    out = _product(a, device).reshape(_output_shape(a)).to(a.out_dtype)
    for addend in (a.bias, a.D if a.accumulate else None):
        if addend is not None:
            out = (out.float() + addend.float()).to(a.out_dtype)
    return out


def check_gemm_out(a: Arguments, device: Device) -> Tensor:
    made = check_gemm(a, device)
    require(
        a.out.shape == made.shape and a.out.dtype == made.dtype,
        f"fp8_gemm: out must be {made.dtype} of shape {tuple(made.shape)}, but is {a.out.dtype} of shape "
        f"{tuple(a.out.shape)}",
    )
    return a.out


def gemm_out(a: Arguments, device: Device) -> Tensor:
    return a.out.copy_(gemm(a, device))
