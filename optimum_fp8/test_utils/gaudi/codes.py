"""FP8 codes and the numbers they stand for, from the layout of their bits.

Casts look a number up between the midpoints of neighbouring codes, and never use torch's own FP8 casts.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

SIGN, NAN = 0x80, 0x7F
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


@dataclass(frozen=True)
class CodeFormat:
    """What the 256 codes of an FP8 format mean on a chip.

    Attributes:
        dtype: the torch dtype that holds the codes.
        mantissa_bits, bias: the layout: the remaining bits but the sign's are the exponent's.
        last: the largest code that is a number; a cast saturates there.
        infinity: the code that is read as infinity; None where there is none. All other codes after `last` are NaN.
    """

    dtype: torch.dtype
    mantissa_bits: int
    bias: int
    last: int
    infinity: int | None

    def _magnitude(self, code: int) -> float:
        """What a code without its sign bit stands for."""
        if code > self.last:
            return float("inf") if code == self.infinity else float("nan")
        exponent, mantissa = divmod(code, 1 << self.mantissa_bits)
        fraction = mantissa / (1 << self.mantissa_bits)
        if exponent == 0:  # subnormal
            return fraction * 2.0 ** (1 - self.bias)
        return (1 + fraction) * 2.0 ** (exponent - self.bias)

    @cached_property
    def values(self) -> Tensor:
        """What each of the 256 codes stands for; float32 [256]."""
        positive = torch.tensor([self._magnitude(code) for code in range(SIGN)], dtype=torch.float32)
        return torch.cat([positive, -positive])

    @cached_property
    def numbers(self) -> Tensor:
        """The non-negative numbers, ascending: the code of each is its place; float32."""
        return self.values[: self.last + 1].contiguous()

    @cached_property
    def midpoints(self) -> Tensor:
        """Where a number is as near to a code as to the next; float32, exact."""
        return (self.numbers[1:] + self.numbers[:-1]) / 2

    @property
    def full_scale(self) -> float:
        """The largest number."""
        return self.numbers[-1].item()

    def decode(self, codes: Tensor) -> Tensor:
        """The numbers that codes stand for; float32, exact."""
        return self.values[codes.view(torch.uint8).long()]

    def encode(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Round numbers to codes: to the nearest, ties to the even code; what is too large, or infinite, to the last.

        Args:
            generator: round up or down by chance instead, the nearer the likelier (stochastic rounding).
        """
        x = x.float()
        magnitude = x.abs().contiguous()
        if generator is None:
            code = torch.bucketize(magnitude, self.midpoints)  # at a midpoint: the lower code
            tie = magnitude == self.midpoints[code.clamp(max=len(self.midpoints) - 1)]
            code = code + (tie & (code < self.last) & (code % 2 == 1))
        else:
            code = (torch.bucketize(magnitude, self.numbers, right=True) - 1).clamp(max=self.last - 1)
            low, high = self.numbers[code], self.numbers[code + 1]
            chance = ((magnitude.clamp(max=self.full_scale) - low) / (high - low)).nan_to_num(0)
            code = code + (torch.rand(x.shape, generator=generator) < chance)
        code = code + SIGN * torch.signbit(x)
        return code.masked_fill(x.isnan(), NAN).to(torch.uint8).view(self.dtype)
