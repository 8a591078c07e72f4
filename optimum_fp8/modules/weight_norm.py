"""Weight normalization: a layer whose weight follows from a length and a direction, as the plain layer it is to others.

`torch.nn.utils.weight_norm` recomputes the weight before each call, `torch.nn.utils.parametrizations.weight_norm` each
time that it is read. Neither changes it in inference.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrizations
from torch.nn.utils.parametrize import is_parametrized, type_before_parametrizations
from torch.nn.utils.weight_norm import WeightNorm

from .handler import Change

_MARK = "_fp8_weight_norm"  # on a plain layer, and on what stands for one: the dimension, and whether it was by a hook
_OF_HOOK = ("weight_g", "weight_v")


@torch.no_grad()
def without_weight_norm(module: Any) -> Any:
    """The layer as a plain one with its effective weight, where weight normalization is all there is; else itself."""
    if hook := _hook_of(module):
        return _plain(module, type(module), hook.compute_weight(module), (hook.dim, True))
    if is_parametrized(module, "weight"):
        steps = list(module.parametrizations["weight"])
        if len(module.parametrizations) == len(steps) == 1 and isinstance(steps[0], parametrizations._WeightNorm):
            return _plain(module, type_before_parametrizations(module), module.weight, (steps[0].dim, False))
    return module


@torch.no_grad()
def with_weight_norm(layer: Any) -> nn.Module:
    """A plain layer with the weight normalization that it had, whose length and direction follow from its weight."""
    dim, by_hook = layer.__dict__.pop(_MARK, (None, False))
    if dim is None:
        return layer
    if not by_hook:
        normed: Any = parametrizations.weight_norm(layer, dim=dim if dim != -1 else None)  # type: ignore[arg-type]
        of_weight = normed.parametrizations.weight
        of_weight.original1.copy_(_direction(of_weight.original1, of_weight.original0))
        return normed  # type: ignore[no-any-return]
    weight = layer._parameters.pop("weight")  # `Hooks` gives the hook back
    length = torch.norm_except_dim(weight, 2, dim)
    values = (length, _direction(weight, length))
    layer._parameters.update({name: nn.Parameter(value) for name, value in zip(_OF_HOOK, values, strict=True)})
    layer.weight = weight.detach()
    return layer


def _direction(weight: torch.Tensor, length: torch.Tensor) -> torch.Tensor:
    """A direction for every length: zeros have none, and would make NaN of a length of 0."""
    return torch.where(length == 0, 1.0, weight)


@dataclass
class _Hook(Change):
    """A hook that was taken off; `owner` are the hooks of a module."""

    key: int = 0

    def undo(self) -> None:
        self.owner[self.key] = self.before


def take_hooks(modules: Iterable[nn.Module]) -> list[Change]:
    """Take off the hooks that would recompute the weights of these modules, which they brought from what they replaced.

    Returns:
        what was changed.
    """
    found = [(module._forward_pre_hooks, key, hook) for module in modules for key, hook in _hooks(module)]
    for hooks, key, _ in found:
        del hooks[key]
    return [_Hook(hooks, hook.name, hook, key) for hooks, key, hook in found]


def _hooks(module: nn.Module) -> list[tuple[int, WeightNorm]]:
    hooks = module._forward_pre_hooks.items()
    return [(key, hook) for key, hook in hooks if isinstance(hook, WeightNorm) and hook.name == "weight"]


def _hook_of(module: nn.Module) -> WeightNorm | None:
    return next((hook for _, hook in _hooks(module) if set(_OF_HOOK) <= set(module._parameters)), None)


def _plain(module: Any, cls: Any, weight: torch.Tensor, mark: tuple[int, bool]) -> Any:
    plain: Any = cls.__new__(cls)  # a parametrized module refuses to be copied
    plain.__dict__.update(module.__dict__)
    plain._modules = {name: child for name, child in module._modules.items() if name != "parametrizations"}
    others = {name: value for name, value in module._parameters.items() if name not in _OF_HOOK}
    plain._parameters = {"weight": nn.Parameter(weight.detach(), requires_grad=False), **others}
    plain.__dict__.pop("weight", None)
    plain.__dict__[_MARK] = mark
    return plain
