"""Attention that looks up its function by name, and yet cannot be computed by ours: what of its source tells.

Such a class does something else for "eager" and "sdpa" than for any other name, has an eager function that takes
more than ours does, or takes masks to be boolean, which those for "sdpa" alone are. Classes of transformers that hand a
selection of keys to any other function are known, though: `selection.py` says what it means.
"""

from __future__ import annotations

import ast
import inspect
import sys
from collections.abc import Hashable, Iterator
from functools import cache
from typing import Any, cast

from torch import nn

from ..modules.class_source import class_tree
from .detect import Kind, attention_kind
from .function import NAME, attention_forward
from .selection import SELECTING, is_known

_TAKEN = frozenset(inspect.signature(attention_forward).parameters)
_ASKED = "_attn_implementation"


def own_paths(model: nn.Module) -> dict[int, tuple[str, str]]:
    """The modules of a model that need its own attention, by `id` of their configurations: name and reason."""
    found: dict[int, tuple[str, str]] = {}
    for name, module in model.named_modules():
        config = module.__dict__.get("config")
        if config is None or id(config) in found or attention_kind(module) is not Kind.INTERFACE:
            continue
        if why := own_path(cast(Hashable, type(module))):
            found[id(config)] = name, why
    return found


@cache
def own_path(owner: Hashable) -> str:
    """Why a class that looks up its attention function needs its model's own; empty: ours does the same."""
    cls = cast(type, owner)
    for base in inspect.getmro(cls):
        if base in nn.Module.__mro__:
            continue
        tree = class_tree(cast(Any, base))
        if tree is None:
            return f"the source of {base.__name__} cannot be read: what it hands to attention is not known"
        given = set(_handed_over(tree))
        selecting = sorted(given.intersection(SELECTING))
        if selecting and not is_known(base):
            return f"it hands over {', '.join(map(repr, selecting))}, which select the keys to attend to"
        if not selecting and any(_tells_ours_apart(node) for node in ast.walk(tree) if isinstance(node, ast.Compare)):
            return "it does something else for attn_implementation 'eager' and 'sdpa' than for any other"
        if any(_negates_a_mask(node) for node in ast.walk(tree)):
            return "it takes masks to be boolean, and those that are added to scores would turn around"
        if more := sorted((_used_by_eager(tree, base) & given) - _TAKEN):
            return f"its attention takes {', '.join(map(repr, more))}, which attention in FP8 does not"
    return ""


def _handed_over(tree: ast.Module) -> Iterator[str]:
    """Names of the arguments that a class hands to its attention function by name."""
    functions = set(_looked_up(tree))
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in functions:
            yield from (keyword.arg for keyword in node.keywords if keyword.arg is not None)
        # kwargs["indices"] = …, which goes along
        if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store) and isinstance(node.slice, ast.Constant):
            yield str(node.slice.value)


def _looked_up(tree: ast.Module) -> Iterator[str]:
    """Variables that hold what was looked up."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign | ast.AnnAssign) and "ALL_ATTENTION_FUNCTIONS" in ast.unparse(node):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            yield from (target.id for target in targets if isinstance(target, ast.Name))


def _tells_ours_apart(node: ast.Compare) -> bool:
    """Whether a comparison of the implementation's name comes out for ours as for neither "eager" nor "sdpa"."""
    if len(node.ops) != 1 or not ast.unparse(node.left).endswith(_ASKED):
        return False
    try:
        names = ast.literal_eval(node.comparators[0])
    except ValueError:
        return False
    names = [names] if isinstance(names, str) else list(names)
    among = {name: name in names for name in ("eager", "sdpa", NAME)}
    return among[NAME] not in (among["eager"], among["sdpa"])


def _negates_a_mask(node: ast.AST) -> bool:
    """`….mask.logical_not()`, which takes the zeros of a mask that is added for False; `~` would refuse them."""
    if not (isinstance(node, ast.Attribute) and node.attr == "logical_not"):
        return False
    return isinstance(node.value, ast.Name) and "mask" in node.value.id


def _used_by_eager(tree: ast.Module, cls: type) -> set[str]:
    """The parameters that the eager function beside a class makes use of."""
    around = vars(sys.modules.get(cls.__module__, object))
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and "eager" in node.id}
    used: set[str] = set()
    for function in (around.get(name) for name in names):
        body = class_tree(cast(Any, function)) if inspect.isfunction(function) else None
        if body is not None:
            loaded = {node.id for node in ast.walk(body) if isinstance(node, ast.Name)}
            used |= loaded.intersection(inspect.signature(cast(Any, function)).parameters)
    return used
