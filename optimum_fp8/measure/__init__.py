"""Measuring: observers, statistics, and the store they are kept in. Nothing here depends on a target device."""

from .fingerprint import model_fingerprint, weight_digest
from .observers import Observers
from .statistics import TensorStatistics
from .store import KINDS, Measurements, measurements_path

__all__ = [
    "KINDS",
    "Measurements",
    "Observers",
    "TensorStatistics",
    "measurements_path",
    "model_fingerprint",
    "weight_digest",
]
