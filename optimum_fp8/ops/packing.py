"""What a backend wants before a model's first call: a layout of weights, scales as numbers, calls that start it up.

Checkpoints never change: a packed weight has the shape and the values that it had.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from . import dispatch


def _nothing(*args: object) -> None:
    """What a backend does that needs no start-up."""


@dataclass(frozen=True)
class Packing:
    """What the kernels of a backend want.

    Attributes:
        devices: device types that it serves unasked.
        matrix: given a matrix `[out, in]`, the same values with the strides that products read fastest.
        constants: whether they take scales as numbers, or as tensors that stay (`constants.py`).
        set_up: called before tensors move to these devices; as often as one likes.
        initialize: called with a converted model that lies there, packed.
    """

    devices: tuple[str, ...]
    matrix: Callable[[torch.Tensor], torch.Tensor]
    constants: bool = False
    set_up: Callable[[], None] = _nothing
    initialize: Callable[[nn.Module], None] = _nothing


_packings: dict[str, Packing] = {}


def register_packing(backend: str, packing: Packing) -> None:
    """Make known what the kernels of a backend want; one of the same name is replaced."""
    _packings[backend] = packing


def packing_of(backend: str) -> Packing:
    """What the kernels of a backend want."""
    return _packings[backend]


def packing_for(device: torch.device) -> Packing | None:
    """What the forced backend wants, else that which serves the device; None: nothing."""
    forced = dispatch.forced_backend()
    if forced is not None:
        return _packings.get(forced)
    return next((packing for packing in _packings.values() if device.type in packing.devices), None)
