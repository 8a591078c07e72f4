"""Hooks on attention modules: whose scales a layer of a cache takes, and that they leave no trace."""

from __future__ import annotations

from typing import Any

import torch
import transformers as hf
from cache.conftest import CACHE, SCALES, attention_modules, cache_of, calibrate, llama
from torch import nn

from optimum_fp8.cache import attach_cache, detach_cache, in_fp8, observe_caches


def test_attaching_leaves_no_trace_when_removed(ids):
    model = llama()

    def hooks() -> list[Any]:
        names = ("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_forward_hooks", "_forward_hooks_with_kwargs")
        return [(name, list(getattr(module, name))) for module in model.modules() for name in names]

    before, modules = hooks(), attention_modules(model)
    handles = [attach_cache(modules.values(), SCALES["dynamic"]) for _ in range(2)]
    assert sum(len(keys) for _, keys in hooks()) == sum(len(keys) for _, keys in before) + 4 * len(modules)
    watch = observe_caches(modules, lambda name, keys, values: None)
    handles[1].remove()
    watch.remove()
    assert hooks() == before
    attach_cache(modules.values(), SCALES["dynamic"])
    detach_cache(model.modules())
    assert hooks() == before
    assert not any("_optimum_fp8_cache" in vars(module) for module in model.modules())


class Looping(nn.Module):
    """Attention that runs twice over the same input and keeps a layer of the cache for each time."""

    def __init__(self, attention: nn.Module):
        super().__init__()
        self.attention = attention

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        first = self.attention(*args, **kwargs)
        index = self.attention.layer_idx
        self.attention.layer_idx = index + 2
        try:
            self.attention(*args, **kwargs)
        finally:
            self.attention.layer_idx = index
        return first


def test_layers_a_module_does_not_call_its_own_take_its_scales(ids):
    model = llama()
    calibrate(model, lambda: model(ids))
    modules = list(attention_modules(model).values())
    attach_cache(modules, SCALES["static"])
    for layer in model.model.layers:
        layer.self_attn = Looping(layer.self_attn)
    with torch.no_grad():
        cache = cache_of(model(ids, **{CACHE: hf.DynamicCache()}))
    assert [in_fp8(layer) for layer in cache.layers] == [True] * 4
    for layer, module in zip(cache.layers, modules * 2, strict=True):
        assert torch.equal(layer.scales.k, module.k_scale)


def test_a_module_without_hooks_writes_in_high_precision(ids):
    """The scales of the module that ran before it are not its own."""
    model = llama()
    calibrate(model, lambda: model(ids))
    attach_cache([model.model.layers[0].self_attn], SCALES["static"])
    with torch.no_grad():
        layers = cache_of(model(ids)).layers
    assert [in_fp8(layer) for layer in layers] == [True, False]
    assert type(layers[1].keys) is torch.Tensor
