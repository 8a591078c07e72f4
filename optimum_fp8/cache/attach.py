"""Hooks on attention modules that make the caches they write to FP8.

They sit on the modules that write, so it does not matter who made the cache (`generate`, a plain forward, the user) or
how a model numbers its layers, and self- and cross-attention each bring their own scales.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from ..errors import FP8StateError
from .arguments import cache_among, layer_at, layer_index
from .convert import fp8_layer, is_empty, parts_of, refusal
from .layer import FP8Layer
from .scales import CacheScales

ScalesOf = Callable[[nn.Module], "CacheScales | None"]
_RECORD = "_optimum_fp8_cache"

# Attention made of torch's operators, and our own. Others (flash, flex, kernels from the hub) may read memory directly.
_ASK_TORCH = (None, "eager", "sdpa", "optimum_fp8")


@dataclass
class CacheRecord:
    """What became of the caches a module wrote to.

    Attributes:
        layers: how many layers became FP8.
        refused: why others did not, with counts.
    """

    layers: int = 0
    refused: dict[str, int] = field(default_factory=dict)


class CacheHooks:
    """Hooks that are on modules until `remove()`."""

    def __init__(self, modules: Iterable[nn.Module]):
        self.modules = list(modules)

    def remove(self) -> None:
        """Take them off; caches that are FP8 already stay so."""
        detach_cache(self.modules)


def attach_cache(modules: Iterable[nn.Module], scales_of: ScalesOf) -> CacheHooks:
    """Let the caches that `modules` write to become FP8; hooks that did this before are replaced.

    Args:
        modules: attention modules that call `Cache.update` in their forward.
        scales_of: gives a module's scales, None where its cache stays in high precision; called once for each layer
            of a new cache. A copy of the model calls the same function with its own modules.
    """
    hooks = CacheHooks(modules)
    detach_cache(hooks.modules)
    for module in hooks.modules:
        setattr(module, _RECORD, CacheRecord())
        module.register_forward_pre_hook(partial(_make_fp8, scales_of), with_kwargs=True)
    return hooks


def detach_cache(modules: Iterable[nn.Module]) -> None:
    """Take the hooks of `attach_cache` off `modules`, which may be copies of those they were put on."""
    for module in modules:
        module.__dict__.pop(_RECORD, None)
        ours = [
            key
            for key, hook in module._forward_pre_hooks.items()
            if isinstance(hook, partial) and hook.func is _make_fp8
        ]
        for key in ours:
            del module._forward_pre_hooks[key], module._forward_pre_hooks_with_kwargs[key]


def cache_record(module: nn.Module) -> CacheRecord:
    """What became of the caches that `module` wrote to since `attach_cache`."""
    return getattr(module, _RECORD, None) or CacheRecord()


def _make_fp8(scales_of: ScalesOf, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Before a module runs: make the layers it may write to FP8, with its scales."""
    cache, index = cache_among(args, kwargs), layer_index(module)
    if cache is None or index is None:
        return
    parts = parts_of(cache)
    for part in parts:
        layer = layer_at(part, index)
        if layer is None:
            continue
        # Of an encoder-decoder cache both layers are made ready; one that stays empty gets the next module's scales.
        if not (isinstance(layer, FP8Layer) and layer.written):
            layer = part.layers[index] = _converted(layer, scales_of, module, index, knows_whose=len(parts) == 1)
        if isinstance(layer, FP8Layer):
            layer.ordinary = getattr(getattr(module, "config", None), "_attn_implementation", None) not in _ASK_TORCH


def _converted(layer: Any, scales_of: ScalesOf, module: nn.Module, index: int, knows_whose: bool) -> Any:
    """The layer as FP8, or as it is where that cannot be."""
    record: CacheRecord = getattr(module, _RECORD)
    if reason := refusal(layer):
        record.refused[reason] = record.refused.get(reason, 0) + 1
        return layer
    scales = scales_of(module)
    if scales is None:
        return layer
    if not knows_whose and not isinstance(layer, FP8Layer) and not is_empty(layer):
        raise FP8StateError(
            f"the encoder-decoder cache given to {type(module).__name__} holds {int(layer.get_seq_length())} positions "
            "in high precision: begin with an empty cache, or with one that this model wrote"
        )
    if not torch.compiler.is_compiling():
        scales.check(f"{type(module).__name__} (layer {index})")
    record.layers += 1
    return fp8_layer(layer, scales)
