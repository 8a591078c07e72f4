"""transformers' cache layers as storage: which of them only store, one for scales beside another, what one stores."""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers.cache_utils import (
    BaseQuantizedLayer,
    CacheLayerMixin,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticLayer,
    StaticSlidingWindowLayer,
)

from ..errors import FP8ConfigError, FP8NotAvailableError
from .scales import CacheScales

# Layers that do nothing but hold what they are given; a class with an `update` of its own may compute with it.
_HOLDERS = (DynamicSlidingWindowLayer, DynamicLayer, StaticSlidingWindowLayer, StaticLayer)


STORES_FP8 = ("hpu",)  # device types that have all operators on storage for FP8 dtypes, as index_copy_ of a CPU has not


def as_stored(codes: torch.Tensor) -> torch.Tensor:
    """FP8 codes as operators that move them take them: on Gaudi as they are, elsewhere, where some are missing, bytes.

    Args:
        codes: any shape, FP8.
    """
    return codes if codes.device.type in STORES_FP8 else codes.view(torch.uint8)


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
    if type(layer).update in [kind.update for kind in _HOLDERS]:
        return None
    return f"{type(layer).__name__} does more than hold keys and values"


def refuse_offloading(cache: Any) -> None:
    """Refuse a cache that is to be offloaded where there is nothing to offload from.

    Raises:
        FP8NotAvailableError: there is no CUDA device, and transformers' offloading would ask for its streams.
    """
    if getattr(cache, "offloading", False) and not torch.cuda.is_available():
        raise FP8NotAvailableError(
            f"the {type(cache).__name__} is to offload its layers, which transformers does from CUDA devices to the "
            "CPU, and there is no CUDA device: leave out offloading=True, or cache_implementation='offloaded'"
        )


def scale_layer_for(layer: Any) -> Any:
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


def quantize_held(layer: Any, scales: CacheScales) -> Any:
    """Quantize what an initialized layer holds, in place.

    Returns:
        the layer that holds its dynamic scales, in the same state; None for static scales.
    """
    layer.keys, k_scale = _quantized(scales, layer.keys, scales.k)
    layer.values, v_scale = _quantized(scales, layer.values, scales.v)
    keep_address(layer)
    if not scales.is_dynamic:
        return None
    scale_layer = scale_layer_for(layer)
    scale_layer.lazy_initialization(k_scale, v_scale)
    scale_layer.keys, scale_layer.values = k_scale, v_scale
    for name in ("cumulative_length", "cumulative_length_int"):
        if hasattr(layer, name):
            setattr(scale_layer, name, copy.deepcopy(getattr(layer, name)))
    keep_address(scale_layer)
    return scale_layer


def keep_address(layer: Any) -> None:
    """Tell torch.compile, as transformers does, that static storage stays where it is."""
    if isinstance(layer, StaticLayer) and not torch.compiler.is_compiling():
        for tensor in (layer.keys, layer.values, layer.cumulative_length):
            torch._dynamo.mark_static_address(tensor)


def _quantized(scales: CacheScales, x: torch.Tensor, scale: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    if x.numel() == 0:  # a growing layer begins without a shape
        return as_stored(x.to(scales.fmt.dtype)), x.float()
    codes, scale = scales.quantize(x, scale)
    return as_stored(codes), scale
