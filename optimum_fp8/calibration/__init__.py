"""Calibration: the kinds of data, and the loop that runs them through a model."""

from . import sources
from .batching import batch_size_of, collated, companion, groups, tokenized
from .facts import ModelFacts, facts_of
from .run import calibrate
from .source import SOURCES, FileSource, Source, check_dataset, register_source

__all__ = [
    "SOURCES",
    "FileSource",
    "ModelFacts",
    "Source",
    "batch_size_of",
    "calibrate",
    "check_dataset",
    "collated",
    "companion",
    "facts_of",
    "groups",
    "register_source",
    "sources",
    "tokenized",
]
