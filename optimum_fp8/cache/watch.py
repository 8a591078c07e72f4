"""Watching what attention modules write to caches, for models that cache something else than attention gets (MLA)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers.cache_utils import LinearAttentionCacheLayerMixin

from ..errors import FP8StateError
from .arguments import cache_among, layer_at, layer_index
from .convert import parts_of, refusal
from .layer import FP8Layer, WatchedHybridLayer, WatchedLayer

See = Callable[[str, torch.Tensor, torch.Tensor], None]


class CacheWatch:
    """The hooks of `observe_caches`, until `remove()`."""

    def __init__(self, handles: list[RemovableHandle]):
        self._handles = handles

    def remove(self) -> None:
        """Take them off."""
        while self._handles:
            self._handles.pop().remove()


def observe_caches(modules: Mapping[str, nn.Module], see: See) -> CacheWatch:
    """Watch what `modules` write to caches, before it is stored.

    Args:
        modules: attention modules by name.
        see: called with the name, the keys and the values, `[batch, heads, new length, size]`, whenever one writes.
    """
    return CacheWatch(
        [
            module.register_forward_pre_hook(partial(_watch, name, see), with_kwargs=True)
            for name, module in modules.items()
        ]
    )


def _watch(name: str, see: See, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Before a module runs: have the layers it may write to tell `see`."""
    cache, index = cache_among(args, kwargs), layer_index(module)
    if cache is None or index is None:
        return
    for part in parts_of(cache):
        layer = layer_at(part, index)
        if isinstance(layer, FP8Layer):
            raise FP8StateError(f"{name}: the cache it is measured with is FP8 already: begin with an empty cache")
        if layer is not None and not isinstance(layer, WatchedLayer) and refusal(layer) is None:
            hybrid = isinstance(layer, LinearAttentionCacheLayerMixin)
            part.layers[index] = layer = WatchedHybridLayer(layer) if hybrid else WatchedLayer(layer)
        if isinstance(layer, WatchedLayer):
            layer.see = partial(see, name)  # of the two layers in an encoder-decoder cache, one is written to
