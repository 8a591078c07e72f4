"""Modules that hand themselves to an object that computes their attention: diffusers' `self.processor(self, …)`."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Hashable
from functools import cache
from typing import cast

from torch import nn

from ..modules.class_source import class_tree


def processor_classes(module: nn.Module) -> tuple[type, ...]:
    """The classes of what a module hands itself to in its forward pass, but for modules that hooks reach themselves."""
    found = (getattr(module, name, None) for name in _handed_to(cast(Hashable, type(module))))
    return tuple(type(each) for each in found if callable(each) and not is_reached_by_hooks(each))


def is_reached_by_hooks(module: object) -> bool:
    """Whether calling a module runs its hooks: some processors are modules with a `__call__` of their own."""
    return isinstance(module, nn.Module) and type(module).__call__ is nn.Module.__call__


@cache
def _handed_to(owner: Hashable) -> tuple[str, ...]:
    """Every X in `self.X(self, …)` in the source of a class and of its bases."""
    names: dict[str, None] = {}
    for base in inspect.getmro(cast(type, owner)):
        tree = None if base in nn.Module.__mro__ else class_tree(base)
        calls = (node for node in (ast.walk(tree) if tree is not None else ()) if isinstance(node, ast.Call))
        for call in calls:
            if isinstance(call.func, ast.Attribute) and _is_self(call.func.value) and _is_self(*call.args[:1]):
                names[call.func.attr] = None
    return tuple(names)


def _is_self(node: ast.expr | None = None) -> bool:
    return isinstance(node, ast.Name) and node.id == "self"
