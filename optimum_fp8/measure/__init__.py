"""Measuring: observers, the hooks that feed them, and the store. Nothing here depends on a target device."""

from . import observers
from .fingerprint import model_fingerprint, weight_digest
from .hooks import Observers
from .observer import OBSERVERS, Observer, Statistic, observer_class, register_observer
from .store import Measurements, Ranges, measurements_path

__all__ = [
    "OBSERVERS",
    "Measurements",
    "Observer",
    "Observers",
    "Ranges",
    "Statistic",
    "measurements_path",
    "model_fingerprint",
    "observer_class",
    "observers",
    "register_observer",
    "weight_digest",
]
