"""Calibration block by block, for models larger than memory."""

from .blocks import parts_of
from .file_memory import FileMemory
from .finished import work_folder
from .run import calibrate_sequentially, check_sequential

__all__ = ["FileMemory", "calibrate_sequentially", "check_sequential", "parts_of", "work_folder"]
