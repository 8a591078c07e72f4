"""Convolutions in FP8: nn.Conv2d, and any number of dimensions once a handler is registered for its class."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .. import ops
from ..errors import FP8StateError
from ..scales import Scheme
from .base import FP8Module
from .handler import register_handler
from .layer import LayerHandler


class FP8Conv(FP8Module):
    """Convolution with an FP8 weight `[out, in / groups, k…]`, of one to three dimensions."""

    rows_are_tokens = False

    origin: Any

    def __init__(self, origin: Any, scheme: Scheme):
        super().__init__(origin.weight.shape, origin, scheme)
        self.dimensions = origin.weight.ndim - 2
        # Padding that differs between sides, or is not zeros, is laid around the input beforehand.
        self.border = _border(origin)
        padded = isinstance(origin.padding, str) or self.border is not None
        self.padding = (0,) * self.dimensions if padded else tuple(origin.padding)

    @classmethod
    def refuses(cls, module: Any) -> str | None:
        return "transposed convolutions are not covered" if getattr(module, "transposed", False) else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        origin, scheme = self.origin, self.scheme
        if self.border:
            x = F.pad(x, self.border, mode="constant" if origin.padding_mode == "zeros" else origin.padding_mode)
        try:
            return ops.conv(
                x,
                self.weight,
                self.weight_scale,
                self.activation_scale(x),
                self.bias,
                stride=origin.stride,
                padding=self.padding,
                dilation=origin.dilation,
                groups=origin.groups,
                full_scale=scheme.fmt.full_scale,
                arithmetic=scheme.arithmetic,
                record=self.record,
            )
        except (RuntimeError, IndexError):
            self._check_fit(x)
            raise

    def _check_fit(self, x: torch.Tensor) -> None:
        """After an error: say so if it is the input or the bias that does not fit."""
        self.check_bias()
        channels, dimensions = self.origin.in_channels, self.dimensions
        if x.ndim not in (dimensions + 1, dimensions + 2) or x.shape[-dimensions - 1] != channels:
            sizes = ", ".join(("D", "H", "W")[-dimensions:])
            raise FP8StateError(
                f"{self.name}: an {type(self).__name__} of {channels} input channels was given {tuple(x.shape)}, "
                f"expected (N, {channels}, {sizes}) or ({channels}, {sizes}): look at what the model hands to this "
                "module"
            )

    def extra_repr(self) -> str:
        origin = self.origin
        return f"{origin.in_channels}, {origin.out_channels}, {origin.kernel_size}, {super().extra_repr()}"


class FP8Conv2d(FP8Conv):
    """2-D convolution with an FP8 weight `[out, in / groups, kh, kw]`."""


def _border(origin: Any) -> list[int] | None:
    """What `F.pad` lays around an input; None where the operator pads."""
    if origin.padding == "valid" or (not isinstance(origin.padding, str) and origin.padding_mode == "zeros"):
        return None
    border: list[int] = []
    for dim in reversed(range(origin.weight.ndim - 2)):  # F.pad counts from the last dimension
        if origin.padding == "same":
            total = origin.dilation[dim] * (origin.kernel_size[dim] - 1)
            border += [total // 2, total - total // 2]
        else:
            border += [int(origin.padding[dim])] * 2
    return border


register_handler(LayerHandler("conv2d", (nn.Conv2d,), FP8Conv2d))
