"""Inputs as torch.autocast casts them, whose list of operators knows nothing of FP8 modules."""

from __future__ import annotations

import torch

from ..ops.operands import HIGH_PRECISION

# Asked at every call: a question for all devices at once takes a tenth of the time of one for a device.
_is_on = getattr(torch._C, "_is_any_autocast_enabled", lambda: True)


def autocast(x: torch.Tensor) -> torch.Tensor:
    """`x` in the dtype in which autocast runs a product on its device; as it is where autocast is off."""
    if not _is_on() or x.dtype not in HIGH_PRECISION or x.is_meta or not torch.is_autocast_enabled(x.device.type):
        return x
    return x.to(torch.get_autocast_dtype(x.device.type))
