"""Measuring: observers, the hooks that feed them, and the store. Nothing here depends on a target device."""

from . import observers
from .fingerprint import architecture, difference, model_fingerprint, weight_digest
from .foreign import files_of_inc, not_found
from .hooks import Observers
from .observer import OBSERVERS, Observer, Statistic, observer_class, register_observer
from .store import Measurements, Ranges, check_dump_path, kept_prefix, measurements_path, why_unwritable

__all__ = [
    "OBSERVERS",
    "Measurements",
    "Observer",
    "Observers",
    "Ranges",
    "Statistic",
    "architecture",
    "check_dump_path",
    "difference",
    "files_of_inc",
    "kept_prefix",
    "measurements_path",
    "model_fingerprint",
    "not_found",
    "observer_class",
    "observers",
    "register_observer",
    "weight_digest",
    "why_unwritable",
]
