"""Weights whose dtype other code reads to learn "the model's dtype": they must stay in high precision.

Modeling code often casts an activation to the dtype of a weight (`x.to(self.projection.weight.dtype)`), and a
transformers model takes the dtype of its first parameter for its own. With an FP8 weight there, activations would be
cast to FP8 without a scale, silently. Which weights are read so is found in the source of the classes around them.
"""

from __future__ import annotations

import ast
import inspect
from functools import cache
from typing import Any

from torch import nn
from transformers import PreTrainedModel

_SETUP_METHODS = ("__init__", "_init_weights")


def dtype_read_by_owner(model: nn.Module) -> set[str]:
    """Names of the modules `….X` for which the code of a class around them reads `X.weight.dtype`."""
    modules, read = dict(model.named_modules()), set()
    for name in modules:
        attribute = next((part for part in reversed(name.split(".")) if not part.isdigit()), None)
        parts = name.split(".")
        owners = (modules.get(".".join(parts[:depth])) for depth in range(len(parts)))
        classes: list[Any] = [type(owner) for owner in owners if owner is not None]
        if name and any(attribute in _weights_read_for_dtype(owner) for owner in classes):
            read.add(name)
    return read


def first_modules(model: nn.Module) -> set[nn.Module]:
    """Modules without bias whose weight is the first parameter of a transformers model, and so tells its dtype."""
    first: set[nn.Module] = set()
    for part in model.modules():
        if isinstance(part, PreTrainedModel):
            owner = next(
                (
                    m
                    for m in part.modules()
                    if any(p.is_floating_point() for p in m._parameters.values() if p is not None)
                ),
                None,
            )
            if owner is not None and getattr(owner, "bias", None) is None:
                first.add(owner)
    return first


@cache
def _weights_read_for_dtype(owner: Any) -> frozenset[str]:
    """Every X in `….X.weight.dtype` or `….X[i].weight.dtype` in the methods of a class."""
    try:
        tree = ast.parse(inspect.cleandoc("\n" + inspect.getsource(owner)))
    except (OSError, TypeError, SyntaxError):
        return frozenset()  # no source to be had: FP8 modules refuse an unscaled FP8 input when they are called
    methods = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name not in _SETUP_METHODS]
    names = {_holder(node) for method in methods for node in ast.walk(method) if _is(node, "dtype")}
    return frozenset(name for name in names if name)


def _holder(dtype: Any) -> str | None:
    weight = dtype.value
    if not _is(weight, "weight"):
        return None
    holder = weight.value.value if isinstance(weight.value, ast.Subscript) else weight.value
    return holder.attr if isinstance(holder, ast.Attribute) else None


def _is(node: Any, attribute: str) -> bool:
    return isinstance(node, ast.Attribute) and node.attr == attribute
