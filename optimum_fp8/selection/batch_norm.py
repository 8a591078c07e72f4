"""Batch norms that can be folded: those that alone take the output of a convolution, and take nothing else.

That is known of adjacent children of an nn.Sequential that code only calls, and of `h = self.conv(x)` directly followed
by `h = self.norm(h)`, or `self.norm(self.conv(x))`, in the source of a class that mentions neither anywhere else. What
the source does not tell is not folded.
"""

from __future__ import annotations

import ast
import inspect
import sys
from collections import Counter
from collections.abc import Hashable, Iterator
from functools import cache
from typing import Any, NamedTuple, cast

import transformers
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..formats import holds_codes
from ..modules.class_source import class_tree
from .weight_reads import read_by_owner

_NORM_OF: dict[Any, Any] = {
    nn.Conv1d: nn.BatchNorm1d,
    nn.Conv2d: nn.BatchNorm2d,
    nn.Conv3d: nn.BatchNorm3d,
    nn.ConvTranspose1d: nn.BatchNorm1d,
    nn.ConvTranspose2d: nn.BatchNorm2d,
    nn.ConvTranspose3d: nn.BatchNorm3d,
}
_SETTING_UP = {"__init__", "_init_weights", "init_weights"}  # methods that run before any forward pass
_GEOMETRY = {"stride", "kernel_size", "dilation", "padding", "groups", "in_channels", "out_channels"}
_BY_ANY_NAME = {"_modules", "children", "named_children", "modules", "named_modules", "get_submodule"}


class Pair(NamedTuple):
    """The names of a convolution and of the batch norm after it."""

    conv: str
    norm: str


def batch_norm_pairs(model: nn.Module) -> list[Pair]:
    """The batch norms of `model` that can be folded, in evaluation mode, each with its convolution.

    Weights may be on meta. Modules, or weights, that stand in several places are left alone.
    """
    modules: dict[str, Any] = dict(model.named_modules())
    shared, outside = _shared(model), _reached_from_outside(model)
    pairs = []
    for name, owner in modules.items():
        children = list(owner._modules)
        if _forward_replaced(owner):
            continue
        if _is_sequential(owner):
            holder = _holder(modules, name)
            called = holder is not None and holder not in outside
            found = set(zip(children, children[1:], strict=False)) if called else set()
        else:
            flows = _flows(cast(Hashable, type(owner)))
            found = {each for each in flows if outside.isdisjoint(each) and set(each) <= set(children)}
        for first, second in sorted(found, key=lambda each: children.index(each[0])):
            conv, norm = owner._modules[first], owner._modules[second]
            if _fits(conv, norm) and not {id(each) for each in (conv, norm, *_weights(conv))} & shared:
                prefix = f"{name}." if name else ""
                pairs.append(Pair(f"{prefix}{first}", f"{prefix}{second}"))
    read = read_by_owner(model, certain=False) if pairs else set()
    return [pair for pair in pairs if read.isdisjoint(pair)]


def _fits(conv: Any, norm: Any) -> bool:
    """Whether these are a convolution and a batch norm that compute as torch's do, of as many channels."""
    kind = next((kind for kind in _NORM_OF if isinstance(conv, kind)), None)
    if kind is None or not isinstance(norm, _NORM_OF[kind]):
        return False
    if type(conv).forward is not kind.forward or type(norm).forward is not _BatchNorm.forward:
        return False
    if any(_forward_replaced(each) or each._forward_hooks or each._forward_pre_hooks for each in (conv, norm)):
        return False
    weight = conv._parameters.get("weight")
    if weight is None or set(conv._parameters) != {"weight", "bias"} or conv._modules or norm._modules:
        return False
    if not weight.is_floating_point() or holds_codes(weight.dtype):
        return False
    has_statistics = norm.running_mean is not None and norm.running_var is not None
    return has_statistics and norm.num_features == conv.out_channels and not (conv.transposed and conv.groups > 1)


def _weights(module: Any) -> list[nn.Parameter]:
    return [each for each in module._parameters.values() if each is not None]


def _shared(model: nn.Module) -> set[int]:
    """The identities of modules and parameters that are reached in more than one way: by two names, or from a list."""
    counts = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
    counts += Counter(id(each) for module in model.modules() for each in _weights(module))
    for value in (value for module in model.modules() for name, value in vars(module).items() if name[:1] != "_"):
        items = value.values() if type(value) is dict else value if type(value) in (list, tuple) else [value]
        counts += Counter(id(each) for each in items if isinstance(each, nn.Module))
    return {key for key, count in counts.items() if count > 1}


def _forward_replaced(module: Any) -> bool:
    return "forward" in vars(module) and not hasattr(module, "_hf_hook")


def _is_sequential(module: Any) -> bool:
    return isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward


def _holder(modules: dict[str, Any], name: str) -> str | None:
    """The attribute under which a class holds an nn.Sequential, or that around it, and does no more than call it.

    Empty if it is the model, None if code does more with it.
    """
    while name:
        parent, _, leaf = name.rpartition(".")
        owner = modules[parent]
        if not _is_sequential(owner) or _forward_replaced(owner):
            return leaf if leaf in _only_called(cast(Hashable, type(owner))) else None
        name = parent
    return ""


# --- what the source of classes tells -----------------------------------------------------------------------------


@cache
def _methods(cls: Any) -> tuple[ast.FunctionDef, ...] | None:
    """All that a class and its bases define and that may run in a forward pass; None where that is not to be known.

    Source may be missing, not be that of the `forward` there is, or reach modules by names that it does not say.
    """
    found: list[ast.FunctionDef] = []
    definer = next(base for base in inspect.getmro(cls) if "forward" in vars(base))
    forward = inspect.unwrap(vars(definer)["forward"])
    named = (getattr(forward, "__module__", None), getattr(forward, "__qualname__", None))
    if definer is not nn.Module and named != (definer.__module__, f"{definer.__qualname__}.forward"):
        return None
    general = (object, *transformers.PreTrainedModel.__mro__)  # they name no module of a model's own
    for base in (each for each in inspect.getmro(cls) if each not in general):
        tree = class_tree(base)
        if tree is None:
            return None
        body = next((node.body for node in ast.walk(tree) if isinstance(node, ast.ClassDef)), [])
        found += [node for node in body if isinstance(node, ast.FunctionDef) and node.name not in _SETTING_UP]
    return None if any(_names_any(node) for method in found for node in ast.walk(method)) else tuple(found)


def _names_any(node: ast.AST) -> bool:
    """`getattr(self, …)`, `self.children()` and their like."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("getattr", "vars"):
        return bool(node.args) and isinstance(node.args[0], ast.Name) and node.args[0].id == "self"
    return _own(node) in _BY_ANY_NAME


def _nodes(cls: Any) -> Iterator[ast.AST]:
    return (node for method in _methods(cls) or () for node in ast.walk(method))


def _own(node: ast.AST) -> str | None:
    """X of `self.X`."""
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self":
        return node.attr
    return None


def _asked_for(node: ast.AST) -> str | None:
    """X of `self.X is not None` and `self.X is None`, which change nothing about what a module is called with."""
    if isinstance(node, ast.Compare) and isinstance(node.ops[0], (ast.Is, ast.IsNot)):
        alone = len(node.comparators) == 1 and getattr(node.comparators[0], "value", ...) is None
        return _own(node.left) if alone else None
    return None


def _uses(cls: Any) -> Counter[str | None]:
    """How often a class mentions each `self.X`, other than to ask whether it is there, or how it is laid out."""
    nodes = list(_nodes(cls))
    laid_out = Counter(_own(node.value) for node in nodes if isinstance(node, ast.Attribute) and node.attr in _GEOMETRY)
    calls = [node for node in nodes if isinstance(node, ast.Call)]
    passed = Counter[str | None](name for call in calls for name in _measured(call, cls))
    return Counter(map(_own, nodes)) - Counter(map(_asked_for, nodes)) - laid_out - passed


def _measured(call: ast.Call, cls: Any) -> Iterator[str]:
    """Every X in `function(…, self.X, …)` of which a function of the class's module reads nothing but geometry."""
    function = vars(sys.modules[cls.__module__]).get(call.func.id) if isinstance(call.func, ast.Name) else None
    tree = class_tree(function) if inspect.isfunction(function) else None
    if tree is None or not isinstance(tree.body[0], ast.FunctionDef):
        return
    nodes = list(ast.walk(tree))
    for argument, given in zip(tree.body[0].args.args, call.args, strict=False):
        uses = sum(isinstance(node, ast.Name) and node.id == argument.arg for node in nodes)
        reads = sum(
            isinstance(node, ast.Attribute) and node.attr in _GEOMETRY and getattr(node.value, "id", "") == argument.arg
            for node in nodes
        )
        if (name := _own(given)) and uses == reads:
            yield name


@cache
def _only_called(cls: Any) -> frozenset[str]:
    """Every X for which a class calls `self.X`, and does nothing else with it but ask whether it is there."""
    called = Counter(_own(node.func) for node in _nodes(cls) if isinstance(node, ast.Call))
    return frozenset(name for name, count in _uses(cls).items() if name and count == called[name])


@cache
def _flows(cls: Any) -> frozenset[tuple[str, str]]:
    """Every A, B for which a class gives what `self.A` returns to `self.B` and nothing else, and that only."""
    uses, found = _uses(cls), set()
    for node in _nodes(cls):
        if isinstance(node, ast.Call) and len(node.args) == 1 and isinstance(node.args[0], ast.Call):
            found.add((_own(node.args[0].func), _own(node.func) if not node.keywords else None))
        for block in (getattr(node, name, None) for name in ("body", "orelse", "finalbody")):
            if isinstance(block, list):
                found |= {_in_turn(first, second) for first, second in zip(block, block[1:], strict=False)}
    return frozenset((a, b) for a, b in found if a and b and uses[a] == uses[b] == 1)


def _in_turn(first: ast.stmt, second: ast.stmt) -> tuple[str | None, str | None]:
    """A, B of `h = self.A(…)` and `h = … self.B(h) …`, or `return … self.B(h) …`, with no other h in the second.

    The second may be the first thing to do `if self.B is not None`.
    """
    if not (isinstance(first, ast.Assign) and isinstance(first.value, ast.Call) and len(first.targets) == 1):
        return None, None
    kept, asked = first.targets[0], None
    if isinstance(second, ast.If):
        is_there = isinstance(second.test, ast.Compare) and isinstance(second.test.ops[0], ast.IsNot)
        asked = _asked_for(second.test) if is_there else None
        if asked is None:
            return None, None
        second = second.body[0]
    if not (isinstance(kept, ast.Name) and isinstance(second, (ast.Assign, ast.Return)) and second.value is not None):
        return None, None
    if isinstance(second, ast.Assign) and [ast.dump(each) for each in second.targets] != [ast.dump(kept)]:
        return None, None
    taker = _sole_taker(second.value, kept.id)
    return (_own(first.value.func), taker) if asked in (None, taker) else (None, None)


def _sole_taker(value: ast.expr, name: str) -> str | None:
    """B, if all that an expression does with a variable is `self.B(name)`, there and then."""
    nodes = list(ast.walk(value))
    uses = sum(isinstance(node, ast.Name) and node.id == name for node in nodes)
    takers = [
        _own(node.func)
        for node in nodes
        if isinstance(node, ast.Call) and not node.keywords and [getattr(x, "id", None) for x in node.args] == [name]
    ]
    later = any(isinstance(node, (ast.Lambda, ast.GeneratorExp)) for node in nodes)
    return takers[0] if len(takers) == uses == 1 and not later else None


def _reached_from_outside(model: nn.Module) -> set[str]:
    """Every X for which some class in the model reads `….X` of anything but itself."""
    classes = {type(module) for module in model.modules() if not type(module).__module__.startswith("torch.")}
    return {
        node.attr
        for cls in classes
        for node in _nodes(cls)
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load) and _own(node) is None
    }
