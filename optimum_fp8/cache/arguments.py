"""The cache among the arguments a module is called with, and the layer of it that belongs to the module."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers.cache_utils import Cache

_INDEX_NAMES = ("layer_idx", "layer_id", "layer_index")


def cache_among(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Cache | None:
    """The cache, whatever its argument is called (`cache`, `past_key_values`, `layer_past`, …)."""
    for argument in (*kwargs.values(), *args):
        if isinstance(argument, Cache):
            return argument
    return None


def layer_index(module: nn.Module) -> int | None:
    """Which layer of a cache an attention module writes to; None if it does not say."""
    for name in _INDEX_NAMES:
        index = getattr(module, name, None)
        if isinstance(index, int):
            return index
    return None


def layer_at(cache: Cache, index: int) -> Any:
    """The layer of that index, made if the cache makes its layers as they are needed; None if there is none."""
    while len(cache.layers) <= index and cache.layer_class_to_replicate is not None:
        cache.layers.append(cache.layer_class_to_replicate())
    return cache.layers[index] if index < len(cache.layers) else None
