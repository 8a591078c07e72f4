"""Which modules compute attention, how, and which of them are to be quantized.

Most of transformers' models hand over query, key and value to an attention function that is looked up by name; the
others multiply and take the softmax in their own forward. Which one a class does is found in its source. Model files
for Gaudi are written around helper modules, each of which is one operation of attention; those go by their class names.
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

from .cache import layer_index
from .config import FP8Config
from .selection import Decision, exclusion, refuse_nothing

logger = logging.getLogger(__name__)

# What a module does: it calls an attention function by name, or computes attention by functions of torch itself; or it
# is a helper module: one product, the softmax, attention as a whole, the storage of keys or of values.
INTERFACE, FUNCTIONS = "interface", "functions"
PRODUCT, SOFTMAX, FUSED, STORAGE = "product", "softmax", "fused", "storage"
_HELPERS = {"Matmul": PRODUCT, "Softmax": SOFTMAX, "ModuleFusedSDPA": FUSED, "KVCache": STORAGE}
_OTHER_STORAGE = ("KVCache", "VLLMKVCache")
_PRODUCTS = {"matmul", "bmm", "baddbmm"}
_FUSED = "scaled_dot_product_attention"
# What a user never gets without asking for it; "eager" and "sdpa" are what transformers chooses.
_DEFAULTS = (None, "eager", "sdpa", "optimum_fp8")


def attention_modules(model: nn.Module) -> dict[str, nn.Module]:
    """All modules that compute attention themselves, or store keys or values, by qualified name."""
    modules = dict(model.named_modules())
    kinds = {name: kind for name, module in modules.items() if (kind := attention_kind(module)) is not None}
    helpers = {name for name, kind in kinds.items() if kind in _HELPERS.values()}
    left_out = {name for name in helpers if kinds[name] == SOFTMAX and not _beside_a_product(name, kinds)}
    # A class derived from one of transformers' leaves the work to its helpers; one that multiplies sees what they do.
    for name, kind in kinds.items():
        inside = {helper for helper in helpers if helper.startswith(f"{name}.")}
        if kind == INTERFACE and inside:
            left_out.add(name)
        elif kind == FUNCTIONS:
            left_out |= {helper for helper in inside if kinds[helper] != STORAGE}
    return {name: modules[name] for name in kinds if name not in left_out}


def _beside_a_product(name: str, kinds: dict[str, str]) -> bool:
    parent = name.rpartition(".")[0]
    return any(kind == PRODUCT and other.rpartition(".")[0] == parent for other, kind in kinds.items())


def attention_kind(module: nn.Module) -> str | None:
    """How a module takes part in attention (`INTERFACE`, `FUNCTIONS`, or its kind of helper); None: it does not."""
    kind = _HELPERS.get(type(module).__name__)
    if kind is None or isinstance(module, nn.Softmax) or list(module.children()):
        return _kind_of(cast(Hashable, type(module)))
    if kind == STORAGE and not (hasattr(module, "allocate") and hasattr(module, "update")):
        return None
    return kind


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
    modules = attention_modules(model)
    stores = config.kv_cache and any(attention_kind(module) == STORAGE for module in modules.values())
    for name, module in modules.items():
        kind = attention_kind(module)
        if kind == STORAGE and not config.kv_cache:
            continue
        reason = exclusion(name, module, config) or _other_implementation(module)
        if reason is None and kind == STORAGE:
            reason = storage_refusal(config)
        if reason is None and not config.attention and not _reads_a_cache(module, stores):
            reason = "it writes to no cache"
        decisions.append(Decision(name, type(module).__name__, reason is None, reason or "selected"))
    names = {decision.name for decision in decisions}
    for name, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention) and name not in names:
            decisions.append(Decision(name, type(module).__name__, False, "torch's own attention is not covered"))
        if config.kv_cache and type(module).__name__ in _OTHER_STORAGE and name not in names:
            reason = "it stores keys and values in its own way: only a KVCache with allocate() and update() becomes FP8"
            decisions.append(Decision(name, type(module).__name__, False, reason))
    refuse_nothing(model, [*layers, *decisions])
    if not decisions:
        logger.warning("%s has no attention that is known: attention and kv_cache do nothing", type(model).__name__)
    return decisions


def storage_refusal(config: FP8Config) -> str | None:
    """Why a `KVCache` module cannot be FP8 as `config` has it, or None."""
    if config.scheme in ("dynamic", "weight_only"):  # its model moves what it stores, and would not move scales
        return f"activation_scheme={config.scheme!r}, but a KVCache has one static scale: calibrate it"
    return None


def _reads_a_cache(module: nn.Module, stores: bool) -> bool:
    """Whether an FP8 cache concerns a module at all; `stores`: the model has `KVCache` modules."""
    kind = attention_kind(module)
    if kind in (PRODUCT, FUSED):
        return stores
    return kind in (INTERFACE, STORAGE) or (kind == FUNCTIONS and layer_index(module) is not None)


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
