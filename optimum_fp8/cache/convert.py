"""Caches of transformers turned into FP8 as a whole, and one to be used without a converted model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache

from ..errors import FP8StateError
from .layer import fp8_layer
from .layers import refusal, refuse_offloading
from .scales import CacheScales


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
        FP8NotAvailableError: the cache is to be offloaded, and there is no CUDA device.
    """
    if isinstance(cache, EncoderDecoderCache):
        half = len(scales) // 2
        convert_cache(cache.self_attention_cache, scales[:half])
        convert_cache(cache.cross_attention_cache, scales[half:])
        return cache
    refuse_offloading(cache)
    layers = list(cache.layers)
    if cache.layer_class_to_replicate is not None:  # it would make its layers one by one
        layers += [cache.layer_class_to_replicate() for _ in range(len(scales) - len(layers))]
    if len(layers) != len(scales):
        raise FP8StateError(f"the cache has {len(layers)} layers and there are scales of {len(scales)}")
    for index, (layer, own) in enumerate(zip(layers, scales, strict=True)):
        if own is None:
            continue
        own.check(f"layer {index}")
        if reason := refusal(layer):
            raise FP8StateError(f"layer {index} of the cache cannot be FP8: {reason}; give None as its scales")
    cache.layer_class_to_replicate = None
    cache.layers = [layer if own is None else fp8_layer(layer, own) for layer, own in zip(layers, scales, strict=True)]
    return cache


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
