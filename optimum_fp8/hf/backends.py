"""What backends want before a model is loaded onto their devices."""

from __future__ import annotations

from typing import Any

import torch

from .. import ops

_PLACED_LATER = ("auto", "balanced", "balanced_low_0", "sequential")  # device maps that accelerate has yet to work out


def set_up_devices(device_map: Any) -> None:
    """Have backends get ready for the devices of a `device_map`, before anything moves there.

    Args:
        device_map: as `from_pretrained` takes it; None: the CPU.
    """
    if device_map in _PLACED_LATER:
        return
    named = device_map.values() if isinstance(device_map, dict) else ["cpu" if device_map is None else device_map]
    for device in {_device(name) for name in named if name != "disk"}:
        if (packing := ops.packing_for(device)) is not None:
            packing.set_up()


def _device(name: Any) -> torch.device:
    """The device of that name; a number is that of an accelerator, if there is one."""
    accelerator = torch.accelerator.current_accelerator() if isinstance(name, int) else None
    return torch.device("cpu" if isinstance(name, int) else name) if accelerator is None else accelerator
