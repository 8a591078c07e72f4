"""The steps of quantization, over handlers: every conductor (the public verbs, from_pretrained, …) calls these."""

from .. import attention as attention  # registers its kinds of modules
from .convert import convert_with
from .dequantize import dequantize
from .prepare import (
    finalize_calibration,
    needs_ranges,
    prepare,
    start_observing,
    stored_measurements,
    unmeasured_state,
)
from .state import FP8State, Phase, measuring_state, refuse_second_time, set_state, state_of

__all__ = [
    "FP8State",
    "Phase",
    "convert_with",
    "dequantize",
    "finalize_calibration",
    "measuring_state",
    "needs_ranges",
    "prepare",
    "refuse_second_time",
    "set_state",
    "start_observing",
    "state_of",
    "stored_measurements",
    "unmeasured_state",
]
