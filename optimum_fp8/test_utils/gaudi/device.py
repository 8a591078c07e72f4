"""An emulated device: its number formats and scales, and what was asked of it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .calls import Arguments, Call, Scale, TensorSpec, is_scale, quantizes, scale_values, scaled_dtype
from .codes import E4M3, E5M2, CodeFormat


@dataclass(frozen=True)
class Chip:
    """A generation of Gaudi.

    Attributes:
        name: what the device calls itself.
        formats: by dtype.
        biases: the exponent biases that the matrix engine can read codes with, by dtype.
    """

    name: str
    formats: dict[torch.dtype, CodeFormat]
    biases: dict[torch.dtype, Iterable[int]]

    def scales(self, dtype: torch.dtype) -> set[float]:
        """The scales of codes that cost nothing: another exponent bias than the format's own multiplies by them."""
        return {2.0 ** (self.formats[dtype].bias - bias) for bias in self.biases[dtype]}


_E5M2 = CodeFormat(E5M2, mantissa_bits=2, bias=15, last=0x7B, infinity=0x7C)
CHIPS = {
    "gaudi2": Chip(
        "GAUDI2",
        {E4M3: CodeFormat(E4M3, mantissa_bits=3, bias=7, last=0x77, infinity=0x78), E5M2: _E5M2},
        {E4M3: (3, 7, 11, 15), E5M2: (15,)},
    ),
    "gaudi3": Chip(
        "GAUDI3",
        {E4M3: CodeFormat(E4M3, mantissa_bits=3, bias=7, last=0x7E, infinity=None), E5M2: _E5M2},
        {E4M3: range(64), E5M2: range(64)},
    ),
}
BRIDGES = ("1.19", "1.24")


class Device:
    """What `emulated` gives: the device, and a record of what was asked of it.

    Attributes:
        chip: its number formats and scales.
        bridge: the generation of the PyTorch bridge: one of `BRIDGES`.
        lazy: lazy mode, in which start-up calls mark tensors as constant; they mark nothing in eager mode.
        calls: the operators that ran, in their order; tracing with fake tensors does not count.
        events: the calls of `habana_frameworks`, in their order.
        constants: the tensors marked as constant, by their keys in a state dict.
        recompute_sdp: what `habana_frameworks.torch.hpu.recompute_sdp_enabled()` says.
    """

    def __init__(self, chip: Chip, bridge: str, lazy: bool, seed: int) -> None:
        self.chip, self.bridge, self.lazy = chip, bridge, lazy
        self.calls: list[Call] = []
        self.events: list[str] = []
        self.constants: dict[str, Tensor] = {}
        self.recompute_sdp = False
        self._generator = torch.Generator().manual_seed(seed)

    def decode(self, codes: Tensor) -> Tensor:
        """The numbers that FP8 codes stand for; float32."""
        return self.chip.formats[codes.dtype].decode(codes)

    def encode(self, x: Tensor, dtype: torch.dtype, stochastic: bool = False) -> Tensor:
        """Numbers as FP8 codes, rounded to the nearest or by chance, and saturated."""
        return self.chip.formats[dtype].encode(x, self._generator if stochastic else None)

    def full_scale(self, dtype: torch.dtype) -> float:
        """The largest number of an FP8 dtype."""
        return self.chip.formats[dtype].full_scale

    def is_constant(self, scale: Tensor | float) -> bool:
        """Whether the graph compiler takes a scale as a constant: a Python number, or a tensor marked as one.

        A part of a tensor is none, whether that was marked or the whole: what a card makes of it is not known.
        """
        if not isinstance(scale, Tensor):
            return True
        storage = scale.untyped_storage()
        marked = {constant.untyped_storage().data_ptr() for constant in self.constants.values()}
        return storage.nbytes() == scale.nbytes and storage.data_ptr() in marked

    def record(self, name: str, overload: str, arguments: Arguments) -> None:
        """Write a call of an operator down."""
        named = vars(arguments)
        scales = {key: self._scales(name, key, named) for key in named if is_scale(name, key)}
        specs = {key: _spec(value) for key, value in named.items()}
        self.calls.append(Call(name, overload, specs, {key: value for key, value in scales.items() if value}))

    def _scales(self, name: str, argument: str, named: dict[str, Any]) -> list[Scale]:
        value = named[argument]
        each = [] if value is None else value if isinstance(value, list | tuple) else [value]
        free = self.chip.scales(scaled_dtype(argument, named))
        return [self._scale(scale, quantizes(name, argument), free) for scale in each]

    def _scale(self, scale: Tensor | float, quantizing: bool, free: set[float]) -> Scale:
        values = scale_values(scale)
        hardware = len(values) == 1 and values[0] > 0
        hardware = hardware and (1 / values[0] if quantizing else values[0]) in free
        return Scale(values, self.is_constant(scale), hardware)


def _spec(value: Any) -> Any:
    if isinstance(value, Tensor):
        return TensorSpec.of(value)
    return [_spec(each) for each in value] if isinstance(value, list | tuple) else value
