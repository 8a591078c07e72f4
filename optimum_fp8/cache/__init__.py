"""The FP8 cache: keys and values stored in FP8 by transformers' own cache layers, read as if they were not."""

from ..ops.fp8_tensor import FP8Tensor
from .active_writer import CacheRecord
from .attach import (
    CacheHooks,
    attach_cache,
    cache_record,
    detach_cache,
    layer_index,
    observe_caches,
    start_record,
)
from .convert import FP8Cache, convert_cache
from .layer import FP8Layer, in_fp8
from .layers import as_stored
from .scales import CacheScales

__all__ = [
    "CacheHooks",
    "CacheRecord",
    "CacheScales",
    "FP8Cache",
    "FP8Layer",
    "FP8Tensor",
    "as_stored",
    "attach_cache",
    "cache_record",
    "convert_cache",
    "detach_cache",
    "in_fp8",
    "layer_index",
    "observe_caches",
    "start_record",
]
