"""What the device refuses: checks that several operators share. They look at shapes and dtypes only."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .codes import E4M3, E5M2

FP8 = (E4M3, E5M2)
HIGH = (torch.float32, torch.bfloat16)


def require(condition: bool, message: str) -> None:
    """Refuse as the bridge does, with a RuntimeError."""
    if not condition:
        raise RuntimeError(message)


def require_dtype(tensor: Tensor, dtypes: tuple[torch.dtype, ...], what: str) -> None:
    require(tensor.dtype in dtypes, f"{what} must be one of {[*dtypes]}, but is {tensor.dtype}")


def require_broadcast(tensor: Tensor, shape: torch.Size | tuple[int, ...], what: str) -> None:
    """Refuse a tensor that does not broadcast onto `shape`, or that would enlarge it."""
    fits = len(tensor.shape) <= len(shape)
    trailing = shape[len(shape) - len(tensor.shape) :] if fits else ()
    fits = fits and all(size in (1, wanted) for size, wanted in zip(tensor.shape, trailing, strict=True))
    require(fits, f"{what} of shape {tuple(tensor.shape)} does not broadcast onto {tuple(shape)}")


def shaped_scale(scale: Any, shape: list[int] | None, like: Tensor) -> Tensor | None:
    """A scale given as a tensor, a number or a list, in the shape it is to have; float32, on the device of `like`."""
    if scale is None:
        return None
    if isinstance(scale, Tensor):
        require_dtype(scale, HIGH, "scale")
        scale = scale.to(torch.float32)
    else:
        scale = torch.tensor(scale, dtype=torch.float32, device=like.device)
        if scale.dim() == 0:
            return scale
    if shape is None:
        return scale
    require(
        scale.numel() == math.prod(shape),
        f"Number of scale elements ({scale.numel()}) is not equal to number of scale_shape elements "
        f"({math.prod(shape)}).",
    )
    return scale.reshape(shape) if scale.numel() > 1 else scale


def require_one_element(scale: Any, what: str, dtypes: tuple[torch.dtype, ...] = HIGH) -> None:
    """Refuse a scale tensor of several elements, or of another dtype."""
    if isinstance(scale, Tensor):
        require(scale.numel() == 1, f"{what}: Multi-element scale tensors are not supported yet.")
        require_dtype(scale, dtypes, what)


def one_element(scale: Any) -> Tensor:
    """A scale of one element as a number of float32; none: 1."""
    if scale is None:
        return torch.ones(())
    return scale.float().reshape(()) if isinstance(scale, Tensor) else torch.tensor(scale, dtype=torch.float32)
