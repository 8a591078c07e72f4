"""Calibration: data loading, and the loop that runs it through a model."""

from .run import calibrate

__all__ = ["calibrate"]
