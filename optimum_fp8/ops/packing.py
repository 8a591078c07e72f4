"""What a backend wants of a module's tensors before its first call: a layout of weights, scales as numbers.

Checkpoints never change: a packed weight has the shape and the values that it had.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from . import dispatch


@dataclass(frozen=True)
class Packing:
    """What the kernels of a backend want.

    Attributes:
        devices: device types that it serves unasked.
        matrix: given a matrix `[out, in]`, the same values with the strides that products read fastest.
        constants: whether they take scales as numbers (`constants.py`).
    """

    devices: tuple[str, ...]
    matrix: Callable[[torch.Tensor], torch.Tensor]
    constants: bool = False


_packings: dict[str, Packing] = {}


def register_packing(backend: str, packing: Packing) -> None:
    """Make known what the kernels of a backend want; one of the same name is replaced."""
    _packings[backend] = packing


def packing_for(device: torch.device) -> Packing | None:
    """What the forced backend wants, else that which serves the device; None: nothing."""
    forced = dispatch.forced_backend()
    if forced is not None:
        return _packings.get(forced)
    return next((packing for packing in _packings.values() if device.type in packing.devices), None)
