"""Calibration: the kinds of data, and the loop that runs them through a model."""

from . import sources
from .batching import batch_size_of, companion, groups, tokenized
from .run import calibrate
from .source import SOURCES, FileSource, Source, check_dataset, register_source

__all__ = [
    "SOURCES",
    "FileSource",
    "Source",
    "batch_size_of",
    "calibrate",
    "check_dataset",
    "companion",
    "groups",
    "register_source",
    "sources",
    "tokenized",
]
