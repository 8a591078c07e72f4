"""The steps of quantization, over handlers: every conductor (the public verbs, from_pretrained, …) calls these."""

from .. import attention as attention  # registers its kinds of modules
from .convert import convert_with
from .dequantize import dequantize
from .origin import Origin
from .prepare import (
    finalize_calibration,
    found_measurements,
    needs_ranges,
    prepare,
    refuse_several_processes,
    settle_measurements,
    start_observing,
    stored_measurements,
    unmeasured_state,
)
from .state import FP8State, Phase, measuring_state, refuse_second_time, set_state, state_of, unwrapped

__all__ = [
    "FP8State",
    "Origin",
    "Phase",
    "convert_with",
    "dequantize",
    "finalize_calibration",
    "found_measurements",
    "measuring_state",
    "needs_ranges",
    "prepare",
    "refuse_second_time",
    "refuse_several_processes",
    "set_state",
    "settle_measurements",
    "start_observing",
    "state_of",
    "stored_measurements",
    "unmeasured_state",
    "unwrapped",
]
