"""The one place that edits a module tree."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

_OF_TORCH = frozenset(vars(nn.Module()))
_HOOKS = (
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
)


def swap(model: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> None:
    """Put each replacement wherever its original stands in `model`, shared modules included.

    Some models also keep modules in a plain list or dictionary, and call them from there. Replacements may hold
    children of their originals, which are replaced in them as well.
    """
    parents = dict.fromkeys(module for top in (model, *replacements.values()) for module in top.modules())
    places = [
        (parent, name, child)
        for parent in parents
        for name, child in parent._modules.items()
        if child is not None and child in replacements
    ]
    for parent, name, child in places:
        new = replacements[child]
        new.train(child.training)
        for hooks in _HOOKS:
            setattr(new, hooks, getattr(child, hooks))
        if hasattr(child, "_hf_hook") and not hasattr(new, "_hf_hook"):  # accelerate moves inputs between devices
            from accelerate.hooks import add_hook_to_module

            add_hook_to_module(new, child._hf_hook)
        parent._modules[name] = new
    for parent in list(model.modules()) if places else ():
        for name, value in vars(parent).items():
            if name not in _OF_TORCH:
                vars(parent)[name] = _replaced(value, replacements)


def _replaced(value: Any, replacements: Mapping[nn.Module, nn.Module]) -> Any:
    """An attribute with the replacements of modules that are in it; lists and dictionaries stay the same object."""
    if isinstance(value, nn.Module):
        return replacements.get(value, value)
    if type(value) is tuple and any(isinstance(item, nn.Module) for item in value):
        return tuple(_replaced(item, replacements) for item in value)
    if type(value) in (list, dict):
        for key, item in list(value.items() if type(value) is dict else enumerate(value)):
            if isinstance(item, nn.Module):
                value[key] = replacements.get(item, item)
    return value
