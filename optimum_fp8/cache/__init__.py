"""The FP8 cache: keys and values stored in FP8 by transformers' own cache layers, read as if they were not."""

from .attach import CacheHooks, attach_cache, cache_record, detach_cache, observe_caches
from .convert import FP8Cache, convert_cache
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
    "observe_caches",
]
