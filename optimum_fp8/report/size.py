"""How much there is of a model: its bytes now and in high precision, and the parameters that each module holds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from ..formats import is_fp8
from ..modules.handler import converted_modules


@dataclass(frozen=True)
class Size:
    """Parameters and buffers, each tensor once however many modules share it.

    Attributes:
        parameters: number of the parameters' values, FP8 codes among them; scales are none.
        in_fp8: how many of these values are FP8 codes.
        codes: bytes of the FP8 codes.
        scales: bytes of their scales, and of those of activations.
        rest: bytes of everything else.
        high_precision: bytes of the model with its weights in the dtype they had, and without scales.
        held: values of the parameters by the name of the module that holds them itself, or holds them first.
    """

    parameters: int
    in_fp8: int
    codes: int
    scales: int
    rest: int
    high_precision: int
    held: dict[str, int]

    @property
    def now(self) -> int:
        """Bytes of all."""
        return self.codes + self.scales + self.rest

    @property
    def share(self) -> float:
        """Of all values of the parameters, how many are FP8 codes, 0 to 1."""
        return self.in_fp8 / max(1, self.parameters)

    def to_dict(self) -> dict[str, int]:
        """The bytes, for JSON."""
        parts = {"codes": self.codes, "scales": self.scales, "rest": self.rest}
        return {"now": self.now, **parts, "high_precision": self.high_precision}


def size_of(model: nn.Module) -> Size:
    """The size of a model, wherever its tensors are (those that are offloaded count as well)."""
    dtypes, scales = _codes_and_scales(model)
    sums, parameters, in_fp8 = dict.fromkeys(("codes", "scales", "rest", "before"), 0), 0, 0
    held: dict[str, int] = {}
    for name, tensor, is_parameter in _tensors(model):
        count, size = tensor.numel(), tensor.numel() * tensor.element_size()
        if id(tensor) in scales:
            sums["scales"] += size
            continue
        sums["codes" if is_fp8(tensor.dtype) else "rest"] += size
        sums["before"] += count * dtypes[id(tensor)].itemsize if id(tensor) in dtypes else size
        if is_parameter:
            parameters, in_fp8 = parameters + count, in_fp8 + count * is_fp8(tensor.dtype)
            held[name] = held.get(name, 0) + count
    return Size(parameters, in_fp8, sums["codes"], sums["scales"], sums["rest"], sums["before"], held)


def _codes_and_scales(model: nn.Module) -> tuple[dict[int, torch.dtype], set[int]]:
    """The dtype that the FP8 codes of converted modules had, and these modules' scales, by `id` of the tensor."""
    dtypes: dict[int, torch.dtype] = {}
    scales: set[int] = set()
    for module, handler in converted_modules(model).values():
        row = handler.row(module)
        for key, tensor in handler.held(module).items():
            if key.endswith("_scale"):
                scales.add(id(tensor))
            elif is_fp8(tensor.dtype) and row is not None and row.high_precision is not None:
                dtypes[id(tensor)] = row.high_precision
    return dtypes, scales


def _tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor, bool]]:
    """Every parameter and buffer once, with the name of its module, and whether it is a parameter."""
    seen: set[int] = set()
    for name, module in model.named_modules():
        for tensors, are_parameters in ((module._parameters, True), (module._buffers, False)):
            for tensor in tensors.values():
                if tensor is not None and id(tensor) not in seen:
                    seen.add(id(tensor))
                    yield name, tensor, are_parameters
