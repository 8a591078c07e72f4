"""Measuring: observers, the hooks that feed them, and the store. Nothing here depends on a target device."""

from . import observers
from .fingerprint import added_data, architecture, difference, model_fingerprint, weight_digest, whole
from .foreign import not_found
from .hooks import Observers
from .inc import IncMeasurements, files_of_inc, has_inc_ranges, read_inc
from .known import AskedRanges, KnownRange
from .observer import OBSERVERS, Context, Observer, Purpose, Statistic, observer_class, register_observer
from .partial import discard, kept_until_saved
from .paths import check_dump_path, kept_prefix, measurements_path, why_unwritable
from .process_group import Processes, processes
from .reread import observed_by
from .store import Measurements, Ranges

__all__ = [
    "OBSERVERS",
    "AskedRanges",
    "Context",
    "IncMeasurements",
    "KnownRange",
    "Measurements",
    "Observer",
    "Observers",
    "Processes",
    "Purpose",
    "Ranges",
    "Statistic",
    "added_data",
    "architecture",
    "check_dump_path",
    "difference",
    "discard",
    "files_of_inc",
    "has_inc_ranges",
    "kept_prefix",
    "kept_until_saved",
    "measurements_path",
    "model_fingerprint",
    "not_found",
    "observed_by",
    "observer_class",
    "observers",
    "processes",
    "read_inc",
    "register_observer",
    "weight_digest",
    "whole",
    "why_unwritable",
]
