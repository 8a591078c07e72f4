"""From rows of calibration data to batches: what their columns hold, and what becomes of each kind."""

from .batches import Rows
from .columns import Row

__all__ = ["Row", "Rows"]
