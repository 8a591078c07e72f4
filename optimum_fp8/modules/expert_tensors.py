"""The tensors of experts in FP8: stacks made of what several have, and what is taken for them from a state dict."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from ..errors import FP8CheckpointError
from ..formats import NumberFormat, codes_beyond, is_fp8, not_finite
from ..scales import Scheme, quantize_weight, unsound
from .weight import stored_weight


def stacked(experts: Sequence[Sequence[tuple[torch.Tensor, torch.Tensor]]]) -> tuple[torch.Tensor, torch.Tensor]:
    """One stack of what several experts have: of each one or two weights, which come below each other.

    Args:
        experts: codes `[out, in]` and scale, `(1,)`, `(out, 1)` or by blocks, of each weight of each expert.

    Returns:
        codes `[E, outs, in]`, and their scale `(E, 1, 1)`, `(E, 2, 1)`, `(E, outs, 1)`, or by blocks.
    """
    codes = torch.stack([torch.cat([as_bytes(each) for each, _ in expert]) for expert in experts])
    scales = torch.stack([torch.cat([as_matrix(scale) for _, scale in expert]) for expert in experts])
    return codes.view(experts[0][0][0].dtype), scales


def quantized_stack(stack: torch.Tensor, halves: int, scheme: Scheme) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales of a stack of weights in high precision; one expert at a time.

    Args:
        stack: `[E, out, in]`.
        halves: how many weights with scales of their own lie below each other in a matrix.
        scheme: how they are scaled.

    Returns:
        codes `[E, out, in]`, and float32 scales `(E, …, …)`.

    Raises:
        FP8ScaleError: a weight that has no sound scale.
    """
    codes = torch.empty(stack.shape, dtype=scheme.fmt.dtype, device=stack.device)
    scales = []
    for expert, out in zip(stack, codes, strict=True):
        rows = []
        for weight, place in zip(expert.chunk(halves), out.chunk(halves), strict=True):
            made, scale, _ = quantize_weight(weight.contiguous(), scheme.weight, scheme.fmt, scheme.hp_dtype)
            place.view(torch.uint8).copy_(made.view(torch.uint8))
            rows.append(as_matrix(scale))
        scales.append(torch.cat(rows))
    return codes, torch.stack(scales)


def as_matrix(scale: torch.Tensor) -> torch.Tensor:
    """The scale of one weight, `(1,)` or of two dimensions, with two dimensions."""
    return scale.reshape(1, 1) if scale.ndim == 1 else scale


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """FP8 codes as bytes, as not every device has every operator for FP8; others as they are."""
    return tensor.view(torch.uint8) if is_fp8(tensor.dtype) else tensor


def misfit(name: str, tensor: torch.Tensor, own: torch.Tensor, fmt: NumberFormat) -> str | None:
    """Why a tensor of a state dict cannot be taken, or None."""
    stored = stored_weight(own) if is_fp8(own.dtype) else own
    exact = is_fp8(own.dtype) or name.endswith("_scale")
    if (exact and tensor.dtype != own.dtype) or tensor.shape not in (stored.shape, own.shape):
        expected, found = (f"{tuple(each.shape)} in {each.dtype}" for each in (stored, tensor))
        return f"{name} is {found}, expected {expected}"
    if is_fp8(own.dtype):
        if not_finite(tensor):
            return f"{name} holds codes that are NaN or Inf: it is damaged"
        wrong = codes_beyond(tensor, fmt)
        return f"{name} {wrong}: it was made for another target" if wrong else None
    wrong = unsound(tensor) if name.endswith("_scale") else None
    return f"{name} {wrong}" if wrong else None


def refuse_codes_beyond(name: str, stacks: Iterable[torch.Tensor], fmt: NumberFormat) -> None:
    """Refuse codes that a number format reads as Inf.

    Raises:
        FP8CheckpointError: names the module and the largest code.
    """
    for codes in stacks:
        if wrong := codes_beyond(codes, fmt):
            raise FP8CheckpointError(
                f"{name} {wrong}: the checkpoint was not made for it; pass the target when loading instead of changing "
                "the checkpoint's configuration"
            )
