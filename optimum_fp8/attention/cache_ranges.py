"""Operands of attention that come out of a cache, in model files for Gaudi: their ranges are those of what is written.

So a cache and the helper modules that read it have one scale: keys and values are rounded once, whether they come
fresh or out of the cache. What a module is handed from a cache may also hold blocks that nothing was written to, which
are no data.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from ..modules.handler import Target
from .detect import STORES, Kind, attention_kind

# The operand of each product that a cache holds, by the product's name, and the names of that cache: optimum-habana's
# and vLLM-Gaudi's, and that of vLLM-Gaudi's latent attention, which has one cache for both.
_PRODUCTS = {"matmul_qk": ("k_cache", "latent_cache_k"), "matmul_av": ("v_cache", "latent_cache_k")}
_FUSED = {"k": "k_cache", "v": "v_cache"}


def caches_read(model: nn.Module, name: str, module: Any) -> dict[str, str]:
    """The names of the cache modules that operands of a helper module come out of, by operand."""
    parent, _, last = name.rpartition(".")
    kind = attention_kind(module)
    beside = {
        child: f"{parent}.{child}".lstrip(".")
        for child, each in model.get_submodule(parent).named_children()
        if kind in (Kind.PRODUCT, Kind.FUSED) and attention_kind(each) in STORES
    }
    if kind is Kind.FUSED:
        return {operand: beside[cache] for operand, cache in _FUSED.items() if cache in beside}
    found = next((beside[cache] for cache in _PRODUCTS.get(last, ()) if cache in beside), None)
    return {} if found is None else {"k": found}


def with_ranges_of_caches(target: Target) -> Target:
    """A helper module with the ranges of the caches it reads, as far as they were measured.

    What comes out of a `KVCache` was written to it: an operand that was larger is something else, whatever the names.
    """
    model, measured = target.model, target.ranges.measurements
    if model is None:
        return target
    places: dict[str, tuple[str, str]] = {}
    for operand, cache in caches_read(model, target.name, target.module).items():
        written = measured.at(cache)
        if "input" not in written.kinds:
            continue
        paged = attention_kind(model.get_submodule(cache)) is Kind.PAGED
        if paged or bool(target.ranges.largest(operand) <= written.largest("input")):
            places[operand] = cache, "input"
    return replace(target, ranges=replace(target.ranges, elsewhere=places)) if places else target
