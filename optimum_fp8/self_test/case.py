"""A case: one call of one operator, and how near to the reference its result has to be."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ..formats import NumberFormat

# So many units in the last place of bfloat16 may lie between two ways to add up the same products: one rounding of the
# output's dtype, and what is left of float32 sums in another order.
ULPS = {torch.bfloat16: 1.0, torch.float16: 0.25, torch.float32: 0.0625}
DTYPE_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


@dataclass(frozen=True)
class Case:
    """One call of an operator on the CPU.

    Attributes:
        operator: its name in `torch.ops.optimum_fp8`.
        name: what sets it apart from the operator's other cases.
        call: its arguments as one value (`ops.arguments`), with tensors on the CPU.
        ulps: how far the result may be from the expected one, in units in the last place of bfloat16; 0: not at all.
        expected: a result that is known; None: that of the reference on the CPU.
        constants: whether scales that the hardware applies at no cost are handed over as numbers.
    """

    operator: str
    name: str
    call: Any
    ulps: float = 0.0
    expected: torch.Tensor | None = None
    constants: bool = False

    def scales(self, call: Any = None) -> list[torch.Tensor]:
        """Of its call, or of the same call on another device: the scales that kernels may take as numbers."""
        named = (self.call if call is None else call)._asdict()
        scales = [value for name, value in named.items() if name.endswith("scale") and isinstance(value, torch.Tensor)]
        return [each for each in scales if each.numel() == 1 or self.operator == "experts"]  # an expert has its own


class Draw:
    """Random operands of a number format, the same ones every time.

    Args:
        fmt: the number format.
    """

    def __init__(self, fmt: NumberFormat) -> None:
        self.fmt = fmt
        self._generator = torch.Generator().manual_seed(0)

    def values(self, *shape: int, dtype: torch.dtype = torch.bfloat16, spread: float = 1.0) -> torch.Tensor:
        """Normally distributed, with the standard deviation `spread`."""
        return (torch.randn(shape, generator=self._generator) * spread).to(dtype)

    def codes(self, *shape: int) -> torch.Tensor:
        """FP8 codes of values around 16."""
        return self.values(*shape, spread=16.0, dtype=torch.float32).clamp_(-128, 128).to(self.fmt.dtype)

    def scales(self, *shape: int, around: float) -> torch.Tensor:
        """Float32 scales from half to one and a half of `around`: no powers of two."""
        return (torch.rand(shape, generator=self._generator) + 0.5) * around


def scale(value: float) -> torch.Tensor:
    """A scale for a whole tensor; float32 `(1,)`."""
    return torch.tensor([value], dtype=torch.float32)


def named(*parts: str) -> str:
    """A case's name, of the parts that are not empty."""
    return ", ".join(part for part in parts if part)
