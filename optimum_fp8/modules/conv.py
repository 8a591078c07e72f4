"""Convolutions in FP8, of one to three dimensions, transposed or not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .. import ops
from ..errors import FP8StateError
from ..ops.operands import channels_last_of, in_out_swapped
from ..scales import Scheme
from .autocast import autocast
from .base import FP8Module
from .handler import register_handler
from .layer import LayerHandler
from .own_forward import run_own


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
        super().__init__(type(self).to_out_in(origin, origin.weight).shape, origin, scheme)
        self.channels_last = channels_last_of(origin.weight)

    @classmethod
    def refuses(cls, module: Any) -> str | None:
        transposed = getattr(module, "transposed", False)
        return f"{cls.__name__} is for convolutions that are not transposed" if transposed else None

    def set_weight(self, weight: torch.Tensor, scale: torch.Tensor) -> None:
        super().set_weight(weight, scale)
        if self.channels_last is not None:
            self.codes.data = self.codes.data.to(memory_format=self.channels_last)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        border, padding = _padding(self, self._dimensions - 2)
        mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
        return self.convolved(F.pad(input, border, mode=mode) if border else input, padding)

    def convolved(self, x: torch.Tensor, padding: Sequence[int], **transposed: Any) -> torch.Tensor:
        """The operator's result for an input `[N, in, …]` or `[in, …]`, with so many zeros on both sides.

        Args:
            x: the input, in high precision.
            padding: one number for each spatial dimension.
            transposed: what the operator has to be told of a transposed convolution.
        """
        parameters: dict[str, Any] = self._parameters
        scheme, x = self.scheme, autocast(x)
        input_scale = self.scale_of(x)
        try:
            return ops.conv(
                x,
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
                **transposed,
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


class FP8Conv1d(FP8Conv, nn.Conv1d):  # type: ignore[misc]
    """nn.Conv1d with an FP8 weight `[out, in / groups, k]`."""


class FP8Conv2d(FP8Conv, nn.Conv2d):  # type: ignore[misc]
    """nn.Conv2d with an FP8 weight `[out, in / groups, kh, kw]`."""


class FP8Conv3d(FP8Conv, nn.Conv3d):  # type: ignore[misc]
    """nn.Conv3d with an FP8 weight `[out, in / groups, kd, kh, kw]`."""


class FP8ConvTranspose(FP8Conv):
    """Transposed convolution with an FP8 weight; its codes are `[out, in / groups, k…]`, as of any convolution."""

    stores_in_out = True

    output_padding: tuple[int, ...]

    @classmethod
    def refuses(cls, module: Any) -> str | None:
        return None

    def to_out_in(self, weight: torch.Tensor) -> torch.Tensor:
        return in_out_swapped(weight, self.groups) if weight.ndim > 2 else weight

    def forward(self, input: torch.Tensor, output_size: list[int] | None = None) -> torch.Tensor:
        dimensions = self._dimensions - 2
        geometry = (self.stride, self.padding, self.kernel_size, dimensions, self.dilation)
        output_padding = self._output_padding(input, output_size, *geometry)
        return self.convolved(input, _padding(self, dimensions)[1], transposed=True, output_padding=output_padding)


def _padding(conv: Any, dimensions: int) -> tuple[list[int], tuple[int, ...]]:
    """What `F.pad` lays around an input beforehand, and the padding of the operator.

    Padding that differs between sides, or is not zeros, is laid around the input.
    """
    none = (0,) * dimensions
    if conv.padding == "valid":  # torch pads by 0 where it would not pad with zeros, and so leaves channels last
        return [] if conv.padding_mode == "zeros" else [0, 0] * dimensions, none
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


class FP8OwnConv(FP8Conv):
    """A convolution in FP8 whose class has a forward of its own, which runs as it is around the product."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return run_own(self, self.origin, super().forward, *args, **kwargs)


class FP8OwnConv1d(FP8OwnConv, FP8Conv1d):  # type: ignore[misc]
    """nn.Conv1d in FP8 of a class with a forward of its own."""


class FP8OwnConv2d(FP8OwnConv, FP8Conv2d):  # type: ignore[misc]
    """nn.Conv2d in FP8 of a class with a forward of its own."""


class FP8OwnConv3d(FP8OwnConv, FP8Conv3d):  # type: ignore[misc]
    """nn.Conv3d in FP8 of a class with a forward of its own."""


class LaterHandler(LayerHandler):
    """Layers of a kind that older versions left in high precision."""

    unlisted_before = True


register_handler(LayerHandler("conv2d", (nn.Conv2d,), FP8Conv2d, FP8OwnConv2d))
register_handler(LaterHandler("conv1d", (nn.Conv1d,), FP8Conv1d, FP8OwnConv1d))
register_handler(LaterHandler("conv3d", (nn.Conv3d,), FP8Conv3d, FP8OwnConv3d))
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
register_handler(LaterHandler("transposed conv", _TRANSPOSED, FP8ConvTranspose))
