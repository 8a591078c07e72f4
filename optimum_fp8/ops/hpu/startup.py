"""Start-up of Gaudi's bridge for inference: once before tensors move to the card, and with each model that is there.

In lazy mode (PT_HPU_LAZY_MODE, which is the bridge's to read) the second call marks as constants the tensors in a
model's state dict whose names have "scale" in them. Each release has its names for the two calls; the newest is taken.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import lru_cache
from importlib import import_module
from typing import Any

from torch import nn

from ...errors import FP8NotAvailableError
from ..constants import kept_inverse
from .bridge import why_missing

_CORE = "habana_frameworks.torch.core"
_SET_UP = ("hpu_inference_set_env", "hpu_set_inference_env", "hpu_set_env")  # the newest first
_INITIALIZE = ("hpu_inference_initialize", "hpu_initialize")


def set_up() -> None:
    """Have the bridge prepare for inference, before anything moves to the card; a second call does nothing.

    Raises:
        FP8NotAvailableError: there is no bridge, or it has no such function.
    """
    _set_up(_core())


def initialize(model: nn.Module) -> None:
    """Have the bridge mark the scales of a model that lies on the card as constants, and the inverses kept of them.

    Raises:
        FP8NotAvailableError: there is no bridge, or it has no such function.
    """
    set_up()
    function = _function(_core(), _INITIALIZE)
    scales_only = {"mark_scales": True, "mark_non_scales": False}
    if not scales_only.keys() <= inspect.signature(function).parameters.keys():
        scales_only = {"mark_only_scales_as_const": True}
    function(_WithInverses(model), **scales_only)


class _WithInverses(nn.Module):
    """A model as the bridge looks at it: its state dict, and the inverses that are kept of its scales."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        found = dict(self.model.state_dict(*args, **kwargs))
        for name, tensor in (*self.model.named_parameters(), *self.model.named_buffers()):
            if (inverse := kept_inverse(tensor)) is not None:
                found[f"{name}_inverse"] = inverse
        return found


@lru_cache(maxsize=1)
def _set_up(core: Any) -> None:
    _function(core, _SET_UP)()


def _core() -> Any:
    if (reason := why_missing()) is not None:
        raise FP8NotAvailableError(f"Intel Gaudi cannot be started: {reason}")
    return import_module(_CORE)


def _function(core: Any, names: tuple[str, ...]) -> Callable[..., Any]:
    found = next((getattr(core, name) for name in names if hasattr(core, name)), None)
    if found is None:
        raise FP8NotAvailableError(
            f"{_CORE} has none of {', '.join(names)}: install a release of Intel Gaudi's software that has"
        )
    function: Callable[..., Any] = found
    return function
