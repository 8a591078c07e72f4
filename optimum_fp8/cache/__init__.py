"""The FP8 cache: keys and values stored in FP8 by transformers' own cache layers, read as if they were not."""

from .attach import CacheHooks, CacheRecord, attach_cache, cache_record, detach_cache
from .convert import FP8Cache, convert_cache
from .layer import FP8Layer
from .scales import CacheScales
from .watch import CacheWatch, observe_caches

__all__ = [
    "CacheHooks",
    "CacheRecord",
    "CacheScales",
    "CacheWatch",
    "FP8Cache",
    "FP8Layer",
    "attach_cache",
    "cache_record",
    "convert_cache",
    "detach_cache",
    "observe_caches",
]
