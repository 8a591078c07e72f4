"""Weights that code multiplies by instead of calling their module: such a module had better stay in high precision.

Foreign code sees the values of an FP8 module's weight, so that reading it computes right, but it dequantizes the whole
weight each time. Which weights are multiplied by in every forward pass is found in the source of the classes around
them; what syntax cannot tell costs time, not correctness. Models of transformers and diffusers also take the dtype of
their first parameter for their own.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Hashable, Iterable, Iterator
from functools import cache
from typing import NamedTuple, cast

import transformers
from torch import nn

from ..modules.class_source import class_tree

# Attributes of a weight that need none of its values.
_HARMLESS = {"shape", "device", "dtype", "requires_grad", "ndim", "size", "numel", "dim", "is_meta", "is_cuda"}


class Read(NamedTuple):
    """`….<holder>.weight` is read, if all attributes of the reading object that are named in `guards` are true, and, if
    it is not `certain`, only under conditions that are known when it runs; or it is `written` into, be it once."""

    holder: str
    guards: frozenset[str] = frozenset()
    certain: bool = True
    written: bool = False


def read_by_owner(model: nn.Module, *, certain: bool = True) -> set[str]:
    """Names of the modules `….X` for which a class around them reads the values of `X.weight` in its forward pass.

    Args:
        model: the model.
        certain: whether in every forward pass; else also in some.
    """
    modules, found = dict(model.named_modules()), set()
    for name in modules:
        parts = name.split(".")
        holder = next((part for part in reversed(parts) if not part.isdigit()), None)
        owners = [modules[parent] for parent in _parents(parts) if parent in modules]
        if name and any(
            read.holder == holder
            and (not certain or (read.certain and all(getattr(owner, guard, True) for guard in read.guards)))
            for owner in owners
            for read in _weights_read_by(cast(Hashable, type(owner)))
        ):
            found.add(name)
    return found


def first_modules(model: nn.Module) -> set[nn.Module]:
    """Modules without bias whose weight is the first parameter of a model that takes its `dtype` from it, as those of
    transformers and diffusers do."""
    first: set[nn.Module] = set()
    for part in model.modules():
        if isinstance(getattr(type(part), "dtype", None), property):
            owner = next((module for module in part.modules() if _has_own_floats(module)), None)
            tells = isinstance(owner, (nn.Embedding, nn.EmbeddingBag))  # which in FP8 still tell the dtype
            if owner is not None and not tells and not _has_bias(owner):
                first.add(owner)
    return first


def _parents(parts: list[str]) -> Iterator[str]:
    return (".".join(parts[:depth]) for depth in range(len(parts)))


def _has_own_floats(module: nn.Module) -> bool:
    return any(parameter is not None and parameter.is_floating_point() for parameter in module._parameters.values())


def _has_bias(owner: nn.Module) -> bool:
    """Whether it has a parameter that stays in high precision, and can tell the dtype."""
    return any(parameter is not None and parameter.ndim == 1 for parameter in owner._parameters.values())


@cache
def _weights_read_by(owner: Hashable) -> frozenset[Read]:
    """Every X in `….X.weight` or `….X[i].weight` in the forward pass of a class: its `forward`, and the methods of its
    own that are called from there. Without source there are none.

    nn.MultiheadAttention does so unless it is in FP8 itself, which is known when all has been decided.
    """
    general = (*transformers.PreTrainedModel.__mro__, *nn.MultiheadAttention.__mro__)
    methods: dict[str, ast.FunctionDef] = {}
    for base in inspect.getmro(cast(type, owner)):
        tree = None if base in general else class_tree(base)
        for node in ast.walk(tree) if tree is not None else ():
            if isinstance(node, ast.FunctionDef):
                methods.setdefault(node.name, node)
    return frozenset(_Search(methods).reads_of("forward", {}))


class _Search:
    """A walk through the methods of a class, by name, from one to those that it calls."""

    def __init__(self, methods: dict[str, ast.FunctionDef]):
        self.methods = methods
        self.callers: list[tuple[str, dict[str, str]]] = []

    def reads_of(self, name: str, given: dict[str, str]) -> Iterator[Read]:
        """The reads of a method that is given modules: {parameter: attribute of `self`}."""
        if name in self.methods and (name, given) not in self.callers:
            self.callers.append((name, given))
            yield from self._reads_in(self.methods[name].body, given)
            self.callers.pop()

    def _reads_in(self, nodes: Iterable[ast.AST], given: dict[str, str]) -> Iterator[Read]:
        for node in nodes:
            if isinstance(node, (ast.If, ast.IfExp)):
                yield from self._reads_in([node.test], given)
                yield from self._reads_of_branches(node, given)
                continue
            if _asks_for_the_class(node):
                continue
            if isinstance(node, ast.Attribute):
                if node.attr in _HARMLESS:
                    continue
                if _in_place(node) and (holder := _holder(node.value, given)) is not None:
                    yield Read(holder, written=True)
                    continue
                if (holder := _holder(node, given)) is not None:
                    yield Read(holder)
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and _is_self(node.func.value):
                yield from self.reads_of(node.func.attr, self._given(node, node.func.attr))
            yield from self._reads_in(ast.iter_child_nodes(node), given)

    def _given(self, call: ast.Call, name: str) -> dict[str, str]:
        """Which parameters of a method a call gives which attributes of `self`."""
        if name not in self.methods:
            return {}
        method = self.methods[name]
        parameters = [argument.arg for argument in (*method.args.posonlyargs, *method.args.args)]
        if not any(isinstance(each, ast.Name) and each.id == "staticmethod" for each in method.decorator_list):
            parameters = parameters[1:]
        pairs = [*zip(parameters, call.args, strict=False), *((word.arg, word.value) for word in call.keywords)]
        return {name: x.attr for name, x in pairs if name and isinstance(x, ast.Attribute) and _is_self(x.value)}

    def _reads_of_branches(self, node: ast.If | ast.IfExp, given: dict[str, str]) -> Iterator[Read]:
        """Reads in both branches are certain; those in one depend on the condition, which attributes may tell."""
        branches: list[list[Read]] = []
        for branch in (node.body, node.orelse):
            branches.append(list(self._reads_in(branch if isinstance(branch, list) else [branch], given)))
        both = {read.holder for read in branches[0]} & {read.holder for read in branches[1]}
        required = _required(node.test)
        for read in branches[0]:
            if read.holder in both or read.written:
                yield read
            elif required is None:
                yield read._replace(certain=False)
            else:
                yield read._replace(guards=read.guards | required)
        for read in branches[1]:
            yield read if read.holder in both or read.written else read._replace(certain=False)


def _required(test: ast.expr) -> frozenset[str] | None:
    """The attributes of `self` whose truth is the condition; None where it depends on anything else."""
    operands = test.values if isinstance(test, ast.BoolOp) and isinstance(test.op, ast.And) else [test]
    names = [operand.attr for operand in operands if isinstance(operand, ast.Attribute) and _is_self(operand.value)]
    return frozenset(names) if len(names) == len(operands) else None


def _is_self(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id == "self"


def _asks_for_the_class(node: ast.AST) -> bool:
    """`isinstance(self.X.weight, …)`, which needs none of its values."""
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "isinstance"


def _in_place(node: ast.Attribute) -> bool:
    """`….mul_` and its like."""
    return node.attr.endswith("_") and not node.attr.startswith("_")


def _holder(node: ast.expr, given: dict[str, str]) -> str | None:
    """X of `….X.weight` and `….X[i].weight`, and of `p.weight` where the parameter p is given X."""
    if not isinstance(node, ast.Attribute) or node.attr != "weight" or not isinstance(node.ctx, ast.Load):
        return None
    holder = node.value.value if isinstance(node.value, ast.Subscript) else node.value
    if isinstance(holder, ast.Name):
        return given.get(holder.id)
    return holder.attr if isinstance(holder, ast.Attribute) else None
