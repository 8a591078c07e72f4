"""Granularities: which values of a tensor share one scale, as values that say the shape of the scale.

granularity        a weight [out, in] has      an input [..., in] has
PerTensor()        (1,)                        (1,)
PerChannel()       (out, 1)                    -
PerToken()         -                           [..., 1]
PerHead()          -                           (heads, 1, 1) for [batch, heads, length, size]
PerBlock(128, 128) (⌈out/128⌉, ⌈in/128⌉)       -
PerGroup(32)       (out, ⌈in/32⌉)              [..., ⌈in/32⌉]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F

from .. import ops
from ..ops.operands import BLOCK, GROUPS

Shape = Sequence[int]


@dataclass(frozen=True)
class Granularity:
    """Base of all granularities.

    Attributes:
        matrices_only: whether it is defined for weights of two dimensions alone.
        of_weights: whether weights have scales at it.
        of_activations: whether activations do.
    """

    matrices_only: ClassVar[bool] = False
    of_weights: ClassVar[bool] = True
    of_activations: ClassVar[bool] = True

    @property
    def group(self) -> int:
        """How the operators name it for activations: 0 a tensor, -1 a row, g > 0 each g values of a row."""
        return 0

    @property
    def fits_operators(self) -> bool:
        """Whether operators, which tell a layout by its shape, read a scale of this granularity as it is meant."""
        return True

    def scale_shape(self, shape: Shape) -> tuple[int, ...]:
        """The shape of the scale of a tensor of `shape`."""
        return (1,)

    def maxabs(self, x: torch.Tensor) -> torch.Tensor:
        """max|x| over the values that share a scale, float32 of `scale_shape(x.shape)`; no copy of `x` is made."""
        return ops.maxabs(x)

    def __str__(self) -> str:
        return "per tensor"


@dataclass(frozen=True)
class PerTensor(Granularity):
    """One scale for the whole tensor."""


@dataclass(frozen=True)
class PerChannel(Granularity):
    """One scale an output channel, the first dimension of a weight."""

    of_activations: ClassVar[bool] = False

    def scale_shape(self, shape: Shape) -> tuple[int, ...]:
        return (shape[0], *[1] * (len(shape) - 1))

    def maxabs(self, x: torch.Tensor) -> torch.Tensor:
        return ops.maxabs(x.flatten(1), group=-1).reshape(self.scale_shape(x.shape))

    def __str__(self) -> str:
        return "per channel"


@dataclass(frozen=True)
class PerToken(Granularity):
    """One scale a row of activations, whose last dimension is its features."""

    of_weights: ClassVar[bool] = False

    @property
    def group(self) -> int:
        return -1

    def scale_shape(self, shape: Shape) -> tuple[int, ...]:
        return (*shape[:-1], 1)

    def maxabs(self, x: torch.Tensor) -> torch.Tensor:
        return ops.maxabs(x, group=-1)

    def __str__(self) -> str:
        return "per token"


@dataclass(frozen=True)
class PerHead(Granularity):
    """One scale an attention head, of `[batch, heads, length, size]`."""

    of_weights: ClassVar[bool] = False

    def scale_shape(self, shape: Shape) -> tuple[int, ...]:
        return (shape[1], 1, 1)

    def maxabs(self, x: torch.Tensor) -> torch.Tensor:
        return x.abs().amax(dim=(0, 2, 3)).float().reshape(-1, 1, 1)

    def __str__(self) -> str:
        return "per head"


@dataclass(frozen=True)
class PerBlock(Granularity):
    """One scale a block of `rows` × `columns` of a weight `[out, in]`; the last blocks may be smaller."""

    rows: int
    columns: int
    matrices_only: ClassVar[bool] = True
    of_activations: ClassVar[bool] = False

    @property
    def fits_operators(self) -> bool:
        return self.rows == self.columns == BLOCK or (self.rows == 1 and self.columns in GROUPS)

    def scale_shape(self, shape: Shape) -> tuple[int, ...]:
        return (-(-shape[0] // self.rows), -(-shape[1] // self.columns))

    def maxabs(self, x: torch.Tensor) -> torch.Tensor:
        by_group = ops.maxabs(x, group=self.columns)
        padded = F.pad(by_group, (0, 0, 0, -x.shape[0] % self.rows))
        return padded.unflatten(0, (-1, self.rows)).amax(dim=1)

    def __str__(self) -> str:
        return f"per block {self.rows}×{self.columns}"


@dataclass(frozen=True)
class PerGroup(Granularity):
    """One scale for each `size` values along the last dimension; the last group of a row may be smaller."""

    size: int
    matrices_only: ClassVar[bool] = True

    @property
    def group(self) -> int:
        return self.size

    @property
    def fits_operators(self) -> bool:
        return self.size in GROUPS

    def scale_shape(self, shape: Shape) -> tuple[int, ...]:
        return (*shape[:-1], -(-shape[-1] // self.size))

    def maxabs(self, x: torch.Tensor) -> torch.Tensor:
        return ops.maxabs(x, group=self.size)

    def __str__(self) -> str:
        return f"per group of {self.size}"
