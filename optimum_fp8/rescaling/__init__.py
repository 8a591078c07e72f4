"""FP8 checkpoints of ours, looked into, and scaled in another way without calibration data."""

from .inspection import inspect
from .new_format import requantize
from .new_scales import rescale

__all__ = ["inspect", "requantize", "rescale"]
