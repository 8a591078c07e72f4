"""What is recorded of a call of an operator."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from .codes import E4M3, E5M2


class Arguments(SimpleNamespace):
    """The arguments of a call by the names that the operator's schema gives them, defaults filled in."""

    def get(self, name: str) -> Any:
        """An argument that not every overload has: None where there is none."""
        return self.__dict__.get(name)


@dataclass(frozen=True)
class TensorSpec:
    """Shape and dtype of a tensor that was passed."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: Tensor) -> TensorSpec:
        return cls(tuple(tensor.shape), tensor.dtype)


@dataclass(frozen=True)
class Scale:
    """A scale that was passed, of one element or of many.

    Attributes:
        values: its elements, in float32.
        constant: a Python number, or a tensor that the graph compiler was told is constant.
        hardware: one element, a power of two that the matrix engine applies as an exponent bias.
    """

    values: tuple[float, ...]
    constant: bool
    hardware: bool

    @property
    def free(self) -> bool:
        """Whether the graph compiler maps it to an exponent bias instead of multiplying by it."""
        return self.constant and self.hardware


@dataclass(frozen=True)
class Call:
    """A call of an operator.

    Attributes:
        name: "fp8_gemm_v2".
        overload: "default", "scalar", …
        arguments: all arguments of the schema by their names; tensors are given as `TensorSpec`.
        scales: the scales among them, by their names; of a list of scales one for each.
    """

    name: str
    overload: str
    arguments: dict[str, Any]
    scales: dict[str, list[Scale]] = field(default_factory=dict)

    @property
    def free_scales(self) -> bool:
        """Whether no scale costs anything: each is constant, has one element, and is in the hardware's set."""
        return all(scale.free for scales in self.scales.values() for scale in scales)


# Multipliers that quantize: powers of two are in the hardware's set if their reciprocals are.
QUANTIZING = {"scale_152", "scale_143", "q_scale_s", "q_scale_o", "output_scale"}


def quantizes(operator: str, argument: str) -> bool:
    """Whether a scale multiplies before a cast to FP8 (1/s), rather than after a product or a cast back (s)."""
    return argument in QUANTIZING or (argument == "scale" and operator == "cast_to_fp8_v2")


def is_scale(operator: str, argument: str) -> bool:
    """Whether an argument is a scale; `scale` of attention multiplies the scores, in any precision."""
    if argument == "scale":
        return operator.startswith("cast_")
    return "scale" in argument and not argument.endswith(("_shape", "_dtype", "scaleMode", "fullscale"))


SCALED = {"A_scale_inv": "A", "B_scale_inv": "B", "scale_weight": "weight"}  # else the first tensor's
WRITTEN = {"scale_152": E5M2, "scale_143": E4M3, "output_scale": E4M3}


def scaled_dtype(argument: str, named: dict[str, Any]) -> torch.dtype:
    """The FP8 dtype of what a scale belongs to: of an operand, or of the codes that a cast gives."""
    if argument in WRITTEN:
        return WRITTEN[argument]
    operand = named[SCALED.get(argument, next(iter(named)))]
    dtypes = (operand.dtype, named.get("dtype"))
    return next((dtype for dtype in dtypes if dtype in (E4M3, E5M2)), E4M3)


def scale_values(value: Tensor | float) -> tuple[float, ...]:
    """The elements of a scale."""
    return tuple(value.detach().float().reshape(-1).tolist()) if isinstance(value, Tensor) else (float(value),)
