"""Hooks on attention modules that make the caches they write to FP8, or observe what is written.

They sit on the modules that write, so it does not matter who made the cache (`generate`, a plain forward, the user) or
how a model numbers its layers, and self- and cross-attention each bring their own scales.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from ..errors import FP8StateError
from .active_writer import CacheRecord, Writer, cache_among, parts_of
from .layer import FP8Layer, fp8_layer, in_fp8
from .layers import refusal, refuse_offloading
from .scales import CacheScales

ScalesOf = Callable[[nn.Module], "CacheScales | None"]
Observe = Callable[[str, torch.Tensor, torch.Tensor], None]
_RECORD, _WRITER = "_optimum_fp8_cache", "_optimum_fp8_writer"
_CACHE_NAMES = ("cache", "past_key_values", "past_key_value", "layer_past")
_INDEX_NAMES = ("layer_idx", "layer_id", "layer_index")

# Attention made of torch's operators, and our own. Others (flash, flex, kernels from the hub) may read memory directly.
_ASK_TORCH = (None, "eager", "sdpa", "optimum_fp8")


class CacheHooks:
    """Hooks that are on modules until `remove()`."""

    def __init__(self) -> None:
        self._handles: list[RemovableHandle] = []

    def put_on(self, module: nn.Module, before: Callable[..., None], after: Callable[..., None]) -> None:
        """Call `before` and `after` around the module's forward."""
        self._handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        self._handles.append(module.register_forward_hook(after, with_kwargs=True))

    def remove(self) -> None:
        """Take them off; caches that are FP8 already stay so."""
        while self._handles:
            self._handles.pop().remove()


def attach_cache(modules: Iterable[nn.Module], scales_of: ScalesOf) -> CacheHooks:
    """Let the caches that `modules` write to become FP8; hooks put on before are replaced.

    Args:
        modules: attention modules that call `Cache.update` in their forward.
        scales_of: gives a module's scales, None where its cache stays in high precision; called once for each layer
            of a new cache. A copy of the model calls the same function with its own modules.
    """
    hooks = CacheHooks()
    for module in modules:
        detach_cache([module])
        start_record(module)
        hooks.put_on(module, partial(_before, scales_of), _after)
    return hooks


def observe_caches(modules: Mapping[str, nn.Module], observe: Observe) -> CacheHooks:
    """Observe what `modules` write to caches, before it is stored; the caches stay in high precision.

    What would not become FP8 is in `cache_record`.

    Args:
        modules: attention modules by name.
        observe: called with the name, the keys and the values, `[batch, heads, new length, size]`, whenever one writes.
    """
    hooks = CacheHooks()
    for name, module in modules.items():
        start_record(module)
        hooks.put_on(module, partial(_before_observed, name, observe), _after_observed)
    return hooks


def detach_cache(modules: Iterable[nn.Module]) -> None:
    """Take the hooks of `attach_cache` off `modules`, which may be copies of those they were put on."""
    for module in modules:
        module.__dict__.pop(_RECORD, None)
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key in [key for key, hook in hooks.items() if getattr(hook, "func", hook) in (_before, _after)]:
                del hooks[key]
                module._forward_pre_hooks_with_kwargs.pop(key, None)
                module._forward_hooks_with_kwargs.pop(key, None)


def start_record(module: nn.Module) -> None:
    """Record from now on what becomes of the caches that `module` writes to."""
    setattr(module, _RECORD, CacheRecord())


def cache_record(module: nn.Module) -> CacheRecord:
    """What became of the caches that `module` wrote to since `attach_cache` or `start_record`."""
    return getattr(module, _RECORD, None) or CacheRecord()


def _before(scales_of: ScalesOf, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Before a module's forward: have the cache it writes to become FP8, by its scales."""
    cache = cache_among(args, kwargs)
    if cache is None:
        _note_foreign(module, kwargs)
    for part in parts_of(cache) if cache is not None else ():
        writer = _writer(part, module)
        writer.scales, writer.record = partial(scales_of, module), getattr(module, _RECORD)
        writer.name = f"{type(module).__name__} (layer {layer_index(module)})"
        writer.ordinary = getattr(getattr(module, "config", None), "_attn_implementation", None) not in _ASK_TORCH


def _note_foreign(module: nn.Module, kwargs: dict[str, Any]) -> None:
    """Record a cache that is none of transformers', and stays as it is."""
    for name in _CACHE_NAMES:
        if hasattr(kwargs.get(name), "update"):
            reason = f"{type(kwargs[name]).__name__} is no cache of transformers: it stays in high precision"
            getattr(module, _RECORD).refused.setdefault(reason, 1)


def _before_observed(
    name: str, observe: Observe, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """Before a module's forward: have what it writes to a cache observed."""
    cache = cache_among(args, kwargs)
    for part in parts_of(cache) if cache is not None else ():
        if any(in_fp8(layer) for layer in part.layers):
            raise FP8StateError(f"{name}: the cache it is measured with is FP8 already: begin with an empty cache")
        _writer(part, module).observe = partial(observe, name)


def _after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    """After a module's forward: what another module writes is not scaled by its scales."""
    cache = cache_among(args, kwargs)
    for part in parts_of(cache) if cache is not None else ():
        writer: Writer | None = getattr(part, _WRITER, None)
        if writer is not None:
            writer.clear()


def _after_observed(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    _after(module, args, kwargs, output)


@dataclass
class _NewLayers:
    """Makes the layers of a cache that makes them one by one."""

    kind: Callable[[], Any]
    writer: Writer

    def __call__(self) -> Any:
        layer = self.kind()
        return layer if refusal(layer) else fp8_layer(layer, writer=self.writer)


def _writer(cache: Any, module: nn.Module) -> Writer:
    """The writer of a cache, whose layers all ask it."""
    writer: Writer | None = getattr(cache, _WRITER, None)
    if writer is None:
        refuse_offloading(cache)
        writer = Writer()
        setattr(cache, _WRITER, writer)
    if cache.layer_class_to_replicate is not None and not isinstance(cache.layer_class_to_replicate, _NewLayers):
        cache.layer_class_to_replicate = _NewLayers(cache.layer_class_to_replicate, writer)
    layers, index = cache.layers, layer_index(module)
    own = layers[index] if index is not None and index < len(layers) else None
    if writer.layers != len(layers) or not (own is None or isinstance(own, FP8Layer)):
        for position, layer in enumerate(layers):
            if isinstance(layer, FP8Layer):
                layer.writer = layer.writer and writer  # it may come from another cache
            elif not refusal(layer):
                layers[position] = fp8_layer(layer, writer=writer)
        writer.layers = len(layers)
        record: CacheRecord | None = getattr(module, _RECORD, None)
        if record is not None and not (own is None or isinstance(own, FP8Layer)) and (reason := refusal(own)):
            record.refused[reason] = record.refused.get(reason, 0) + 1
    return writer


def layer_index(module: nn.Module) -> int | None:
    """Which layer of a cache a module says is its own."""
    for name in _INDEX_NAMES:
        index = getattr(module, name, None)
        if isinstance(index, int):
            return index
    return None
