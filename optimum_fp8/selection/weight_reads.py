"""Weights that other code reads instead of calling their module: they must stay in high precision.

Modeling code often casts an activation to the dtype of a weight (`x.to(self.projection.weight.dtype)`), or multiplies
with the weight itself; a transformers model takes the dtype of its first parameter for its own. Such code would take
FP8 codes for values, silently. Which weights are read is found in the source of the classes around them.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Hashable, Iterator
from functools import cache
from typing import Any, NamedTuple, cast

import transformers
from torch import nn

from ..modules.class_source import class_tree

# Methods that run when nothing is computed, and attributes of a weight that are the same in FP8.
_SETUP_METHODS = (
    *("__init__", "_init", "init", "reset", "tie_", "_tie", "resize", "_resize", "get_", "set_", "extra_repr"),
    *("prune", "_prune", "load", "_load", "save", "from_pretrained", "convert", "remove"),
)
_HARMLESS = {"shape", "device", "requires_grad", "ndim", "size", "numel", "dim", "is_meta", "is_cuda"}


class Read(NamedTuple):
    """`….<holder>.weight` is read, unless an attribute of the reading object named in `guards` is false."""

    holder: str
    guards: frozenset[str]


def read_by_owner(model: nn.Module) -> set[str]:
    """Names of the modules `….X` for which the code of a class around them reads `X.weight`."""
    modules, found = dict(model.named_modules()), set()
    for name in modules:
        parts = name.split(".")
        holder = next((part for part in reversed(parts) if not part.isdigit()), None)
        owners = [modules[parent] for parent in _parents(parts) if parent in modules]
        if name and any(
            read.holder == holder and all(getattr(owner, guard, True) for guard in read.guards)
            for owner in owners
            for read in _weights_read_by(cast(Hashable, type(owner)))
        ):
            found.add(name)
    return found


def first_modules(model: nn.Module) -> set[nn.Module]:
    """Modules without bias whose weight is the first parameter of a transformers model, and so tells its dtype."""
    first: set[nn.Module] = set()
    for part in model.modules():
        if isinstance(part, transformers.PreTrainedModel):
            owner = next((module for module in part.modules() if _has_own_floats(module)), None)
            if owner is not None and getattr(owner, "bias", None) is None:
                first.add(owner)
    return first


def _parents(parts: list[str]) -> Iterator[str]:
    return (".".join(parts[:depth]) for depth in range(len(parts)))


def _has_own_floats(module: nn.Module) -> bool:
    return any(parameter is not None and parameter.is_floating_point() for parameter in module._parameters.values())


@cache
def _weights_read_by(owner: Hashable) -> frozenset[Read]:
    """Every X in `….X.weight` or `….X[i].weight` in the computing methods of a class and its bases."""
    general = (*transformers.PreTrainedModel.__mro__, nn.Module)
    bases = [base for base in inspect.getmro(cast(type, owner)) if base not in general]
    return frozenset(read for base in bases for read in _reads_in(base))


@cache
def _reads_in(cls: Any) -> frozenset[Read]:
    tree = class_tree(cls)
    if tree is None:
        return frozenset()  # FP8 modules refuse inputs that are not high precision
    methods = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and not node.name.startswith(_SETUP_METHODS)
    ]
    return frozenset(read for method in methods for read in _reads_below(method, frozenset()))


def _reads_below(node: ast.AST, guards: frozenset[str]) -> Iterator[Read]:
    """Reads in a syntax tree; those inside `if self.a and self.b:` only happen where both are true."""
    if isinstance(node, ast.Attribute):
        if node.attr in _HARMLESS:
            return
        holder = _holder(node)
        if holder is not None:
            yield Read(holder, guards)
    for field, value in ast.iter_fields(node):
        inner = guards | _required(node.test) if isinstance(node, ast.If) and field == "body" else guards
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                yield from _reads_below(child, inner)


def _required(test: ast.expr) -> frozenset[str]:
    """The attributes of `self` that must be true for a condition to hold."""
    operands = test.values if isinstance(test, ast.BoolOp) and isinstance(test.op, ast.And) else [test]
    return frozenset(
        operand.attr
        for operand in operands
        if isinstance(operand, ast.Attribute) and isinstance(operand.value, ast.Name) and operand.value.id == "self"
    )


def _holder(node: ast.Attribute) -> str | None:
    """X of `….X.weight` and `….X[i].weight`."""
    if node.attr != "weight" or not isinstance(node.ctx, ast.Load):
        return None
    holder = node.value.value if isinstance(node.value, ast.Subscript) else node.value
    return holder.attr if isinstance(holder, ast.Attribute) else None
