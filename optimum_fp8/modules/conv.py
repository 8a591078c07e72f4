"""nn.Conv2d in FP8."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .. import ops
from ..errors import FP8StateError
from .base import FP8Module
from .recipe import Recipe


@dataclass(frozen=True)
class ConvGeometry:
    """The arguments of nn.Conv2d besides the weight and bias."""

    in_channels: int
    out_channels: int
    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    padding: str | tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    padding_mode: str

    @classmethod
    def of(cls, module: nn.Conv2d) -> ConvGeometry:
        return cls(**{name: getattr(module, name) for name in cls.__dataclass_fields__})


class FP8Conv2d(FP8Module):
    """2-D convolution with an FP8 weight `[out, in / groups, kh, kw]`."""

    rows_are_tokens = False

    def __init__(self, origin: Any, recipe: Recipe):
        super().__init__(origin.weight.shape, origin, recipe)
        self.geometry = ConvGeometry.of(origin)
        # Padding that differs between sides, or is not zeros, is laid around the input beforehand.
        self.border = self._border(self.geometry)

    @staticmethod
    def _border(geometry: ConvGeometry) -> list[int] | None:
        if geometry.padding == "valid" or (not isinstance(geometry.padding, str) and geometry.padding_mode == "zeros"):
            return None
        border: list[int] = []
        for dim in (1, 0):  # F.pad counts from the last dimension
            if geometry.padding == "same":
                total = geometry.dilation[dim] * (geometry.kernel_size[dim] - 1)
                border += [total // 2, total - total // 2]
            else:
                border += [int(geometry.padding[dim])] * 2
        return border

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        geometry = self.geometry
        padding = (0, 0) if isinstance(geometry.padding, str) or self.border else geometry.padding
        if self.border:
            mode = "constant" if geometry.padding_mode == "zeros" else geometry.padding_mode
            x = F.pad(x, self.border, mode=mode)
        try:
            return ops.conv2d(
                x,
                self.weight,
                self.weight_scale,
                self.activation_scale(x),
                self.bias,
                stride=geometry.stride,
                padding=padding,
                dilation=geometry.dilation,
                groups=geometry.groups,
                full_scale=self.recipe.fmt.full_scale,
                arithmetic=self.recipe.arithmetic,
                owner=self.owner,
            )
        except (RuntimeError, IndexError):
            self._check_fit(x)
            raise

    def _check_fit(self, x: torch.Tensor) -> None:
        """After an error: say so if it is the input or the bias that does not fit."""
        self.check_bias()
        channels = self.geometry.in_channels
        if x.ndim not in (3, 4) or x.shape[-3] != channels:
            raise FP8StateError(
                f"{self.name}: an FP8Conv2d of {channels} input channels was given {tuple(x.shape)}, expected "
                f"(N, {channels}, H, W) or ({channels}, H, W): look at what the model hands to this module"
            )

    def extra_repr(self) -> str:
        geometry = self.geometry
        return f"{geometry.in_channels}, {geometry.out_channels}, {geometry.kernel_size}, {super().extra_repr()}"
