"""Which modules compute attention, and how.

Most of transformers' models hand over query, key and value to an attention function that is looked up by name; the
others multiply and take the softmax in their own forward, or in that of a processor that they hand themselves to, as
those of diffusers. Which one a class does is found in its source. Model files for Gaudi are written around helper
modules, each of which is one operation of attention; those go by their class names.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Hashable
from enum import Enum, auto
from functools import cache
from typing import Any, cast

import transformers
from torch import nn

from ..modules.class_source import class_tree
from .other_attention import why_other
from .processors import is_reached_by_hooks, processor_classes
from .scale_module import AttentionScales

LOOKED_UP = "looked up by name"
_PRODUCTS = {"matmul", "bmm", "baddbmm", "einsum"}
_SOFTMAX = ("softmax", "logsumexp")  # also under a name of its own, as XSoftmax.apply
_FUSED = "scaled_dot_product_attention"
_ALSO_FUSED = "dispatch_attention_fn"  # of diffusers, which calls torch's own
OTHER_STORAGE = ("KVCache", "VLLMKVCache")


class Kind(Enum):
    """How a module takes part in attention."""

    INTERFACE = auto()  # calls an attention function that it looks up by name
    FUNCTIONS = auto()  # computes attention by functions of torch itself
    # Helper modules:
    PRODUCT = auto()  # one product
    MAPPING = auto()  # a product with a matrix of zeros and ones, from sequences to blocks of a cache and back
    SOFTMAX = auto()
    FUSED = auto()  # attention as a whole
    STORAGE = auto()  # of keys or of values
    PAGED = auto()  # storage that is handed to it, in blocks


HELPERS = {
    "Matmul": Kind.PRODUCT,
    "MatMulWrapper": Kind.PRODUCT,
    "B2BMatmul": Kind.MAPPING,
    "Softmax": Kind.SOFTMAX,
    "BlockSoftmaxConstMax": Kind.SOFTMAX,
    "ModuleFusedSDPA": Kind.FUSED,
    "KVCache": Kind.STORAGE,
    "VLLMKVCache": Kind.PAGED,
}
STORES = (Kind.STORAGE, Kind.PAGED)
# What a helper module has to have besides its name; of the others the name says all.
_METHODS = {Kind.STORAGE: ("allocate", "update"), Kind.PAGED: ("fetch_from_cache",)}


def attention_modules(model: nn.Module) -> dict[str, Kind]:
    """Names of all modules that compute attention themselves, or store keys or values, and how each does it."""
    modules = dict(model.named_modules())
    kinds = {name: kind for name, module in modules.items() if (kind := attention_kind(module)) is not None}
    helpers = {name for name, kind in kinds.items() if kind in HELPERS.values()}
    left_out = {name for name in helpers if kinds[name] is Kind.SOFTMAX and not _beside_a_product(name, kinds)}
    # A class derived from one of transformers' leaves the work to its helpers; one that multiplies sees what they do.
    for name, kind in kinds.items():
        inside = {helper for helper in helpers if helper.startswith(f"{name}.")}
        if kind is Kind.INTERFACE and inside:
            left_out.add(name)
        elif kind is Kind.FUNCTIONS:
            left_out |= {helper for helper in inside if kinds[helper] not in STORES}
    return {name: kind for name, kind in kinds.items() if name not in left_out}


def _beside_a_product(name: str, kinds: dict[str, Kind]) -> bool:
    parent = name.rpartition(".")[0]
    return any(kind is Kind.PRODUCT and other.rpartition(".")[0] == parent for other, kind in kinds.items())


def attention_kind(module: nn.Module) -> Kind | None:
    """How a module takes part in attention; None: it does not."""
    if not is_reached_by_hooks(module):
        return None
    kind = HELPERS.get(type(module).__name__)
    # vLLM-Gaudi's ModuleFusedSDPA has a module inside for another way of calling its kernel.
    whole = kind is not Kind.FUSED and any(not isinstance(child, AttentionScales) for child in module.children())
    if kind is None or isinstance(module, nn.Softmax) or whole:
        return _kind_of(cast(Hashable, type(module)), processor_classes(module))
    return kind if all(hasattr(module, name) for name in _METHODS.get(kind, ())) else None


@cache
def _kind_of(owner: Hashable, processors: tuple[type, ...] = ()) -> Kind | None:
    cls = cast(type, owner)
    if issubclass(cls, (transformers.PreTrainedModel, nn.MultiheadAttention)):
        return None
    used: set[str] = set()
    for base in (*inspect.getmro(cls), *processors):
        if base not in nn.Module.__mro__:
            used |= _names_used(base)
    if LOOKED_UP in used:
        return Kind.INTERFACE
    if why_other(cls.__name__):
        return None
    computes = _FUSED in used or ("softmax" in used and used & _PRODUCTS)
    named = any(word in cls.__name__.lower() for word in ("attention", "attn"))
    return Kind.FUNCTIONS if computes and named else None


@cache
def _names_used(cls: Any) -> frozenset[str]:
    """Names of the functions that a class calls, "matmul" for `@`, `LOOKED_UP` for a look-up of attention by name."""
    tree = class_tree(cls)
    used = set()
    for node in ast.walk(tree) if tree is not None else ():
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.MatMult):
            used.add("matmul")
        if not isinstance(node, ast.Call | ast.Subscript):
            continue
        text = ast.unparse(node.func if isinstance(node, ast.Call) else node)
        if text == "ALL_ATTENTION_FUNCTIONS.get_interface" or text.startswith("ALL_ATTENTION_FUNCTIONS[self."):
            used.add(LOOKED_UP)
        elif text.startswith("ALL_ATTENTION_FUNCTIONS["):  # always torch's own
            used.add(_FUSED)
        name = _FUSED if text.endswith(_ALSO_FUSED) else text.rpartition(".")[2]
        used.add("softmax" if any(word in text.lower() for word in _SOFTMAX) else name)
    return frozenset(used)
