"""Caches of transformers turned into FP8, layer by layer and in place."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.cache_utils import (
    BaseQuantizedLayer,
    Cache,
    CacheLayerMixin,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    EncoderDecoderCache,
    LinearAttentionCacheLayerMixin,
    StaticLayer,
    StaticSlidingWindowLayer,
)

from ..errors import FP8ConfigError, FP8StateError
from .layer import FP8HybridLayer, FP8Layer, LayerOver
from .scales import CacheScales

# Layers that do nothing but hold what they are given; a class with an `update` of its own may compute with it.
_HOLDERS = (DynamicSlidingWindowLayer, DynamicLayer, StaticSlidingWindowLayer, StaticLayer)


def refusal(layer: Any) -> str | None:
    """Why a layer of a cache stays in high precision; None if it can be FP8.

    Raises:
        FP8ConfigError: it quantizes by itself.
    """
    if isinstance(layer, BaseQuantizedLayer):
        raise FP8ConfigError(
            f"the cache has a {type(layer).__name__}, which quantizes by itself, and kv_cache=True asks for FP8: leave "
            "out cache_implementation='quantized', or kv_cache"
        )
    if not isinstance(layer, CacheLayerMixin):
        return f"{type(layer).__name__} holds no keys and values"
    if isinstance(layer, LayerOver) or type(layer).update in [kind.update for kind in _HOLDERS]:
        return None
    return f"{type(layer).__name__} does more than hold keys and values"


def fp8_layer(layer: Any, scales: CacheScales) -> FP8Layer:
    """The FP8 layer around `layer`, which from now on holds codes; what it holds already is quantized.

    An FP8 layer that nothing was written to yet takes the scales instead of its own.
    """
    if isinstance(layer, FP8Layer):
        scale_layer = _scale_layer(layer.inner) if scales.is_dynamic else None
        if scale_layer is not None and layer.is_initialized:
            codes = layer.inner.keys
            no_scales = codes.new_empty((*codes.shape[:2], 0, 1), dtype=torch.float32)
            scale_layer.lazy_initialization(no_scales, no_scales)
        return type(layer)(layer.inner, scale_layer, scales, layer.acts_as)
    if isinstance(layer, LayerOver):
        layer = layer.inner
    over = FP8HybridLayer if isinstance(layer, LinearAttentionCacheLayerMixin) else FP8Layer
    if not layer.is_initialized:
        return over(layer, _scale_layer(layer) if scales.is_dynamic else None, scales, torch.get_default_dtype())
    acts_as, scale_layer = layer.keys.dtype, None
    layer.keys, k_scale = _quantized(scales, layer.keys, scales.k)
    layer.values, v_scale = _quantized(scales, layer.values, scales.v)
    if scales.is_dynamic:
        scale_layer = _filled(_scale_layer(layer), layer, k_scale, v_scale)
    if isinstance(layer, StaticLayer):
        _keep_address(layer)
    return over(layer, scale_layer, scales, acts_as, written=not is_empty(layer))


def is_empty(layer: Any) -> bool:
    """Whether nothing was cached in `layer` yet."""
    return not layer.is_initialized or int(layer.get_seq_length()) == 0


def convert_cache(cache: Cache, scales: Sequence[CacheScales | None]) -> Cache:
    """Turn the layers of `cache` into FP8 layers of the same kinds, in place.

    Args:
        cache: a cache of transformers, dynamic, static, sliding, hybrid or encoder-decoder.
        scales: one for each layer, None for a layer that stays as it is; of an encoder-decoder cache first those of
            its self-attention layers, then those of its cross-attention layers.

    Returns:
        `cache` itself.

    Raises:
        FP8ConfigError: a layer quantizes by itself.
        FP8StateError: more or fewer scales than layers, or a layer that cannot be FP8.
        FP8ScaleError: a scale that is not set, zero, NaN or infinite.
    """
    if isinstance(cache, EncoderDecoderCache):
        half = len(scales) // 2
        convert_cache(cache.self_attention_cache, scales[:half])
        convert_cache(cache.cross_attention_cache, scales[half:])
        return cache
    if cache.layer_class_to_replicate is not None:  # it would make its layers one by one
        cache.layers += [cache.layer_class_to_replicate() for _ in range(len(scales) - len(cache.layers))]
        cache.layer_class_to_replicate = None
    if len(cache.layers) != len(scales):
        raise FP8StateError(f"the cache has {len(cache.layers)} layers and there are scales of {len(scales)}")
    for index, (layer, own) in enumerate(zip(cache.layers, scales, strict=True)):
        if own is None:
            continue
        own.check(f"layer {index}")
        if reason := refusal(layer):
            raise FP8StateError(f"layer {index} of the cache cannot be FP8: {reason}; give None as its scales")
        cache.layers[index] = fp8_layer(layer, own)
    return cache


def parts_of(cache: Cache) -> list[Cache]:
    """The caches that `cache` consists of: for self- and for cross-attention, or itself."""
    if isinstance(cache, EncoderDecoderCache):
        return [cache.self_attention_cache, cache.cross_attention_cache]
    return [cache]


class FP8Cache(DynamicCache):
    """A dynamic cache in FP8, to be used without a converted model.

    A converted model needs none: any empty cache that it is given, or makes, becomes FP8 as it is written.

    Args:
        scales: one for each layer, None for a layer that stays in high precision.
        config: of the model; tells which layers have a sliding window.
        options: of `DynamicCache`.
    """

    def __init__(self, scales: Sequence[CacheScales | None], config: PreTrainedConfig | None = None, **options: Any):
        super().__init__(config=config, **options)
        convert_cache(self, scales)

    @staticmethod
    def converted(cache: Cache, scales: Sequence[CacheScales | None]) -> Cache:
        """`convert_cache(cache, scales)`."""
        return convert_cache(cache, scales)


def _scale_layer(layer: Any) -> Any:
    """An empty layer that will hold the dynamic scales of what `layer` holds."""
    if isinstance(layer, StaticSlidingWindowLayer):
        return StaticSlidingWindowLayer(max_cache_len=layer.max_cache_len, sliding_window=layer.max_cache_len)
    if isinstance(layer, StaticLayer):
        return StaticLayer(max_cache_len=layer.max_cache_len)
    if not isinstance(layer, DynamicSlidingWindowLayer):
        return DynamicLayer()
    window = DynamicSlidingWindowLayer(sliding_window=layer.sliding_window)
    window.record_past = layer.record_past
    return window


def _filled(scale_layer: Any, layer: Any, k_scale: torch.Tensor, v_scale: torch.Tensor) -> Any:
    """`scale_layer` in the state of `layer`, holding the scales of what `layer` holds."""
    scale_layer.lazy_initialization(k_scale, v_scale)
    scale_layer.keys, scale_layer.values = k_scale, v_scale
    for name in ("cumulative_length", "cumulative_length_int"):
        if hasattr(layer, name):
            setattr(scale_layer, name, copy.deepcopy(getattr(layer, name)))
    if isinstance(layer, StaticLayer):
        _keep_address(scale_layer)
    return scale_layer


def _quantized(scales: CacheScales, x: torch.Tensor, scale: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """What a layer holds, as bytes and their scale."""
    if x.numel() == 0:  # a growing layer begins without a shape
        return x.to(torch.uint8), x.float()
    codes, scale = scales.quantize(x, scale)
    return codes.view(torch.uint8), scale


def _keep_address(layer: Any) -> None:
    """Tell torch.compile, as transformers does, that static storage stays where it is."""
    if not torch.compiler.is_compiling():
        for tensor in (layer.keys, layer.values, layer.cumulative_length):
            torch._dynamo.mark_static_address(tensor)
