"""What Gaudi's PyTorch bridge offers: its operators, its version, the generation of the card.

`torch.ops.hpu` has what the bridge registered when `habana_frameworks` was imported; nothing here imports it.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch

from ...errors import FP8NotAvailableError
from ...formats import FP8_DTYPES, detect_target, gaudi_device, number_format
from ..compiling import constant_while_compiling


def operator(name: str, overload: str = "default") -> Any:
    """An overload of `torch.ops.hpu`.

    Raises:
        FP8NotAvailableError: the bridge does not have it; the message names it, and the overloads that there are.
    """
    packet = getattr(torch.ops.hpu, name, None)
    found = getattr(packet, overload, None)
    if found is not None:
        return found
    if (reason := why_missing()) is not None:
        raise FP8NotAvailableError(f"torch.ops.hpu.{name} cannot be called: {reason}")
    there = f"of {name} there are {', '.join(packet.overloads())}" if packet is not None else f"there is no {name}"
    raise FP8NotAvailableError(
        f"torch.ops.hpu.{name}.{overload} is not in this bridge ({there}): install a newer release of Intel Gaudi's "
        "software, or put what calls it on the blocklist"
    )


def offers(name: str, overload: str = "default") -> bool:
    """Whether the bridge has an overload of an operator."""
    return getattr(getattr(torch.ops.hpu, name, None), overload, None) is not None


def why_missing() -> str | None:
    """Why none of Gaudi's operators can be called; None if they can."""
    if offers("cast_to_fp8_v2"):
        return None
    return (
        "torch.ops.hpu has no operators: there is no Intel Gaudi, or its PyTorch bridge is not loaded "
        "(import habana_frameworks.torch first)"
    )


@constant_while_compiling
def full_scale(dtype: torch.dtype) -> float:
    """The largest number that the card's codes of an FP8 dtype stand for.

    Raises:
        FP8ConfigError: a card of a generation that is not known.
    """
    name = next(name for name, known in FP8_DTYPES.items() if known == dtype)
    return number_format(name, _target(gaudi_device())).full_scale


@lru_cache(maxsize=1)
def _target(hpu: Any) -> str:
    """The card's target, asked once for each bridge: every cast needs it."""
    return detect_target()
