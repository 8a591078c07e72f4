"""The one place that edits a module tree."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

_HOOKS = (
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
)


def swap(model: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> None:
    """Put each replacement wherever its original stands in `model`, shared modules included."""
    places = [
        (parent, name, child)
        for parent in list(model.modules())
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
