"""The forward of a module that is measured from inside, put in the place of its own for as long as that takes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from ..measure import Observers


class MeasuredForward:
    """Another forward of a module; `remove` puts its own back, or what accelerate put there.

    Args:
        module: the module.
        forward: called as its own is.
    """

    def __init__(self, module: nn.Module, forward: Callable[..., Any]):
        self.module = module
        self.place = "_old_forward" if hasattr(module, "_hf_hook") else "forward"
        self.before = vars(module).get(self.place)
        vars(module)[self.place] = forward

    def remove(self) -> None:
        if self.before is None:
            vars(self.module).pop(self.place, None)
        else:
            vars(self.module)[self.place] = self.before


def sees(observers: Observers, name: str) -> Callable[[str, torch.Tensor], None]:
    """What is given a kind and a tensor of a module, and measures it if such kinds are: "input", "input_key", …"""
    return partial(_see, observers, name)


def _see(observers: Observers, name: str, kind: str, x: torch.Tensor) -> None:
    if kind.partition("_")[0] in observers.kinds:
        observers.observe(name, kind, x)
