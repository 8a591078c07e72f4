"""The FP8 cache: keys and values stored in FP8 by transformers' own cache layers, read as if they were not."""

from .attach import CacheHooks, attach_cache, cache_record, detach_cache, layer_index, observe_caches
from .convert import FP8Cache, convert_cache
from .gaudi_cache import store_as_before, store_in_fp8
from .layer import FP8Layer, in_fp8
from .scales import CacheScales
from .writer import CacheRecord

__all__ = [
    "CacheHooks",
    "CacheRecord",
    "CacheScales",
    "FP8Cache",
    "FP8Layer",
    "attach_cache",
    "cache_record",
    "convert_cache",
    "detach_cache",
    "in_fp8",
    "layer_index",
    "observe_caches",
    "store_as_before",
    "store_in_fp8",
]
