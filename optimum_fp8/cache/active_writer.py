"""The module that writes to a cache now: set by hooks on attention modules, read by the cache's layers.

So a layer takes the scales of the module that really writes to it, however a model numbers its layers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.cache_utils import Cache, EncoderDecoderCache

from .scales import CacheScales


@dataclass
class CacheRecord:
    """What became of the caches a module wrote to.

    Attributes:
        layers: how many layers became FP8.
        refused: why others did not, with counts.
    """

    layers: int = 0
    refused: dict[str, int] = field(default_factory=dict)


class Writer:
    """The module that writes to a cache now; all layers of the cache share one.

    Attributes:
        scales: gives its scales, or None where its cache stays in high precision; None between calls.
        observe: called with the keys and values that are written; None while nothing is measured.
        record: where to count the layers that become FP8.
        name: of the module, for messages.
        layers: how many layers of the cache ask it.
        ordinary: whether it is handed ordinary tensors, since its attention may read memory without asking torch.
    """

    def __init__(self) -> None:
        self.layers, self.ordinary = 0, False
        self.clear()

    def clear(self) -> None:
        """No module writes."""
        self.scales: Callable[[], CacheScales | None] | None = None
        self.observe: Callable[[torch.Tensor, torch.Tensor], None] | None = None
        self.record: CacheRecord | None = None
        self.name = ""

    def __reduce__(self) -> tuple[Any, ...]:
        return Writer, ()  # a copy of a cache does not copy the module that wrote to it


def cache_among(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Cache | None:
    """The cache among a module's arguments, whatever it is called (`cache`, `past_key_values`, `layer_past`, …)."""
    for argument in (*kwargs.values(), *args):
        if isinstance(argument, Cache):
            return argument
    return None


def parts_of(cache: Cache) -> list[Cache]:
    """The caches that `cache` consists of: for self- and for cross-attention, or itself."""
    if isinstance(cache, EncoderDecoderCache):
        return [cache.self_attention_cache, cache.cross_attention_cache]
    return [cache]
