"""Which modules compute attention, how, and which of them are to be quantized.

Most of transformers' models hand over query, key and value to an attention function that is looked up by name; the
others multiply and take the softmax in their own forward. Which one a class does is found in its source.
"""

from __future__ import annotations

import ast
import inspect
import logging
from collections.abc import Hashable, Iterable
from functools import cache
from typing import Any, cast

import transformers
from torch import nn

from .config import FP8Config
from .selection import Decision, exclusion, refuse_nothing

logger = logging.getLogger(__name__)

INTERFACE, FUNCTIONS = "interface", "functions"
# Helper modules of Gaudi's model files, by class name: each is one operation of attention.
_HELPERS = ("Matmul", "ModuleFusedSDPA")
_STORAGE = ("KVCache", "VLLMKVCache")
_PRODUCTS = {"matmul", "bmm", "baddbmm"}
_FUSED = "scaled_dot_product_attention"
# What a user never gets without asking for it; "eager" and "sdpa" are what transformers chooses.
_DEFAULTS = (None, "eager", "sdpa", "optimum_fp8")


def attention_modules(model: nn.Module) -> dict[str, nn.Module]:
    """All modules that compute attention themselves, by qualified name."""
    found = {name: module for name, module in model.named_modules() if attention_kind(module) is not None}
    helpers = {name for name, module in found.items() if type(module).__name__ in _HELPERS}
    others = found.keys() - helpers
    inside = {name for name in helpers if any(name.startswith(f"{other}.") for other in others)}
    return {name: module for name, module in found.items() if name not in inside}


def attention_kind(module: nn.Module) -> str | None:
    """`INTERFACE` (calls an attention function by name), `FUNCTIONS` (computes it itself) or None (neither)."""
    if type(module).__name__ in _HELPERS and not list(module.children()):
        return FUNCTIONS
    return _kind_of(cast(Hashable, type(module)))


def select_attention(model: nn.Module, config: FP8Config, layers: list[Decision]) -> list[Decision]:
    """Decide about every attention module of `model`; none where neither `attention` nor `kv_cache` is on.

    Args:
        layers: what was decided about layers.

    Raises:
        FP8SelectionError: neither a layer nor an attention module is left to quantize.
    """
    if not config.wants_attention:
        return []
    decisions = []
    for name, module in attention_modules(model).items():
        reason = exclusion(name, module, config) or _other_implementation(module)
        if reason is None and not config.attention and attention_kind(module) == FUNCTIONS and not _caches(module):
            reason = "it writes to no cache"
        decisions.append(Decision(name, type(module).__name__, reason is None, reason or "selected"))
    names = {decision.name for decision in decisions}
    for name, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention) and name not in names:
            decisions.append(Decision(name, type(module).__name__, False, "torch's own attention is not covered"))
        if config.kv_cache and type(module).__name__ in _STORAGE:
            reason = "it stores keys and values itself: only transformers' caches become FP8"
            decisions.append(Decision(name, type(module).__name__, False, reason))
    refuse_nothing(model, [*layers, *decisions])
    if not decisions:
        logger.warning("%s has no attention that is known: attention and kv_cache do nothing", type(model).__name__)
    return decisions


def chosen_implementation(module: nn.Module) -> str | None:
    """The attention implementation that a module's user chose, None where transformers did."""
    name = getattr(getattr(module, "config", None), "_attn_implementation", None)
    return None if name in _DEFAULTS else name


def _other_implementation(module: nn.Module) -> str | None:
    chosen = chosen_implementation(module) if attention_kind(module) == INTERFACE else None
    return None if chosen is None else f"attn_implementation={chosen!r} was chosen"


def telling_the_dtype(model: nn.Module, modules: Iterable[nn.Module]) -> set[nn.Module]:
    """Those of `modules` whose parameters would be a transformers model's first, which tells its dtype."""
    attention, telling = set(modules), set()
    for part in model.modules():
        if not isinstance(part, transformers.PreTrainedModel):
            continue
        for module in part.modules():
            if module in attention:
                telling.add(module)
            if module in attention or any(p.is_floating_point() for p in module.parameters(recurse=False)):
                break
    return telling


def _caches(module: nn.Module) -> bool:
    return getattr(module, "layer_idx", None) is not None


@cache
def _kind_of(owner: Hashable) -> str | None:
    cls = cast(type, owner)
    if issubclass(cls, (transformers.PreTrainedModel, nn.MultiheadAttention)):
        return None
    used: set[str] = set()
    for base in inspect.getmro(cls):
        if base not in nn.Module.__mro__:
            used |= _names_used(base)
    if INTERFACE in used:
        return INTERFACE
    computes = _FUSED in used or ("softmax" in used and used & _PRODUCTS)
    named = any(word in cls.__name__.lower() for word in ("attention", "attn"))
    return FUNCTIONS if computes and named else None


@cache
def _names_used(cls: Any) -> frozenset[str]:
    """Names of the functions that a class calls, "matmul" for `@`, `INTERFACE` for a look-up of attention by name."""
    try:
        tree = ast.parse(inspect.cleandoc("\n" + inspect.getsource(cls)))
    except (OSError, TypeError, SyntaxError):
        return frozenset()
    used = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.MatMult):
            used.add("matmul")
        if not isinstance(node, ast.Call | ast.Subscript):
            continue
        text = ast.unparse(node.func if isinstance(node, ast.Call) else node)
        if text == "ALL_ATTENTION_FUNCTIONS.get_interface" or text.startswith("ALL_ATTENTION_FUNCTIONS[self."):
            used.add(INTERFACE)
        elif text.startswith("ALL_ATTENTION_FUNCTIONS["):  # always torch's own
            used.add(_FUSED)
        name = text.rpartition(".")[2]
        used.add("softmax" if name.lower() == "softmax" else name)
    return frozenset(used)
