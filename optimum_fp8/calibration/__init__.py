"""Calibration: the kinds of data, and the loop that runs them through a model."""

from . import sources
from .batching import batch_size_of, collated, companion, groups, tokenized
from .convergence import range_movement
from .facts import ModelFacts, facts_of
from .rows import Row, Rows
from .run import calibrate
from .sequential import FileMemory, calibrate_sequentially, check_sequential, parts_of, work_folder
from .source import SOURCES, FileSource, RowSource, Source, TableSource, check_dataset, register_source

__all__ = [
    "SOURCES",
    "FileMemory",
    "FileSource",
    "ModelFacts",
    "Row",
    "RowSource",
    "Rows",
    "Source",
    "TableSource",
    "batch_size_of",
    "calibrate",
    "calibrate_sequentially",
    "check_dataset",
    "check_sequential",
    "collated",
    "companion",
    "facts_of",
    "groups",
    "parts_of",
    "range_movement",
    "register_source",
    "sources",
    "tokenized",
    "work_folder",
]
