"""Convolutions in FP8: nn.Conv2d, and any number of dimensions once a handler is registered for its class."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .. import ops
from ..errors import FP8StateError
from ..scales import Scheme, inf_as_nan
from .autocast import autocast
from .base import FP8Module
from .handler import register_handler
from .layer import LayerHandler


class FP8Conv(FP8Module):
    """Convolution with an FP8 weight `[out, in / groups, k…]`, of one to three dimensions."""

    rows_are_tokens = False

    stride: tuple[int, ...]  # as these are of the original, and in its terms
    padding: tuple[int, ...] | str
    padding_mode: str
    dilation: tuple[int, ...]
    groups: int
    in_channels: int
    out_channels: int
    kernel_size: tuple[int, ...]

    def __init__(self, origin: Any, scheme: Scheme):
        super().__init__(origin.weight.shape, origin, scheme)

    @classmethod
    def refuses(cls, module: Any) -> str | None:
        return "transposed convolutions are not covered" if getattr(module, "transposed", False) else None

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        parameters: dict[str, Any] = self._parameters
        scheme, x = self.scheme, input
        border, padding = _padding(self, self._dimensions - 2)
        if border:
            x = F.pad(x, border, mode="constant" if self.padding_mode == "zeros" else self.padding_mode)
        x = autocast(x)
        input_scale = self.activation_scale(x)
        try:
            return ops.conv(
                inf_as_nan(x) if scheme.is_dynamic else x,
                parameters["weight"],
                parameters["weight_scale"],
                input_scale,
                parameters["bias"],
                stride=self.stride,
                padding=padding,
                dilation=self.dilation,
                groups=self.groups,
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
        channels, dimensions = self.in_channels, self._dimensions - 2
        if x.ndim not in (dimensions + 1, dimensions + 2) or x.shape[-dimensions - 1] != channels:
            sizes = ", ".join(("D", "H", "W")[-dimensions:])
            raise FP8StateError(
                f"{self.name}: an {type(self).__name__} of {channels} input channels was given {tuple(x.shape)}, "
                f"expected (N, {channels}, {sizes}) or ({channels}, {sizes}): look at what the model hands to this "
                "module"
            )

    def extra_repr(self) -> str:
        return f"{self.in_channels}, {self.out_channels}, {self.kernel_size}, {super().extra_repr()}"


class FP8Conv2d(FP8Conv):
    """2-D convolution with an FP8 weight `[out, in / groups, kh, kw]`."""


def _padding(conv: Any, dimensions: int) -> tuple[list[int], tuple[int, ...]]:
    """What `F.pad` lays around an input beforehand, and the padding of the operator.

    Padding that differs between sides, or is not zeros, is laid around the input.
    """
    none = (0,) * dimensions
    if conv.padding == "valid":
        return [], none
    if not isinstance(conv.padding, str) and conv.padding_mode == "zeros":
        return [], tuple(conv.padding)
    border: list[int] = []
    for dim in reversed(range(dimensions)):  # F.pad counts from the last dimension
        if conv.padding == "same":
            total = conv.dilation[dim] * (conv.kernel_size[dim] - 1)
            border += [total // 2, total - total // 2]
        else:
            border += [int(conv.padding[dim])] * 2
    return border, none


register_handler(LayerHandler("conv2d", (nn.Conv2d,), FP8Conv2d))
