"""Casts to FP8 that a gradient passes straight through: what the references cast with where they are differentiated."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch

from .operands import broadcast_scale

_straight_through: ContextVar[bool] = ContextVar("optimum_fp8_straight_through", default=False)
is_straight_through = _straight_through.get


@contextmanager
def straight_through() -> Iterator[None]:
    """Give every cast to FP8 inside a gradient: that of x / scale, and zero where the cast saturates."""
    token = _straight_through.set(True)
    try:
        yield
    finally:
        _straight_through.reset(token)


def saturates(x: torch.Tensor, scale: torch.Tensor, full_scale: float) -> torch.Tensor:
    """Where the cast of `x` by `scale` saturates: bool, of the shape of `x`; False where `x` is NaN."""
    return (x.float() * broadcast_scale(scale, x).float().reciprocal()).abs() > full_scale


class StraightThrough(torch.autograd.Function):
    """Codes as float32, and their gradient. A scale that follows from x saturates nothing, and has no gradient."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, scale: torch.Tensor, full_scale: float, cast: Callable[[torch.Tensor], torch.Tensor]
    ) -> torch.Tensor:
        ctx.save_for_backward(x, scale)
        ctx.full_scale = full_scale
        return cast(x).float()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        x, scale = ctx.saved_tensors
        found = gradients[0] * broadcast_scale(scale, x).float().reciprocal()
        if not ctx.needs_input_grad[1]:
            found = found.masked_fill(saturates(x, scale, ctx.full_scale), 0)
        return found.to(x.dtype), None, None, None


class _Constant(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: torch.Tensor) -> torch.Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        return None


def as_constant(scale: torch.Tensor) -> torch.Tensor:
    """A scale that follows from what it scales, and counts as a constant where that is differentiated."""
    return _Constant.apply(scale) if scale.requires_grad else scale
