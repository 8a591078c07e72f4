"""Calibration: data loading, and the loop that runs it through a model."""

from .loaders import check_file
from .run import calibrate

__all__ = ["calibrate", "check_file"]
