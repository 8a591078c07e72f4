"""The steps of quantization, over handlers: every conductor (the public verbs, from_pretrained, …) calls these."""

from .. import attention as attention  # registers its kinds of modules
from .batch_norm import expect_folded, fold_batch_norms, select_folded, unfold_exactly, unfolded_on_error
from .convert import convert_some, convert_with, refuse_unreached, unreached
from .dequantize import dequantize
from .inc_scales import inc_scales, weights_of
from .origin import Origin
from .prepare import (
    are_there,
    empty_measurements,
    finalize_calibration,
    found_measurements,
    needs_ranges,
    new_measurements,
    prepare,
    settle_measurements,
    start_measuring,
    start_observing,
    stored_measurements,
    unmeasured_state,
)
from .provenance import MERGED, data_of, loaded_for, name_of_data, provenance_in, with_change
from .sharded import is_sharded, is_spread, refuse_shares, refuse_spread
from .state import (
    MEASURED_BEFORE,
    FP8State,
    Phase,
    measuring_state,
    refuse_no_module,
    refuse_second_time,
    set_state,
    state_of,
    unwrapped,
)
from .training import finish_training_step, return_to_training, start_training, trained_state
from .unsigned import is_unsigned, signed

__all__ = [
    "MEASURED_BEFORE",
    "MERGED",
    "FP8State",
    "Origin",
    "Phase",
    "are_there",
    "convert_some",
    "convert_with",
    "data_of",
    "dequantize",
    "empty_measurements",
    "expect_folded",
    "finalize_calibration",
    "finish_training_step",
    "fold_batch_norms",
    "found_measurements",
    "inc_scales",
    "is_unsigned",
    "is_sharded",
    "is_spread",
    "loaded_for",
    "measuring_state",
    "name_of_data",
    "needs_ranges",
    "new_measurements",
    "prepare",
    "provenance_in",
    "refuse_no_module",
    "refuse_second_time",
    "refuse_shares",
    "refuse_spread",
    "refuse_unreached",
    "return_to_training",
    "select_folded",
    "set_state",
    "settle_measurements",
    "signed",
    "start_measuring",
    "start_observing",
    "start_training",
    "state_of",
    "stored_measurements",
    "trained_state",
    "unfold_exactly",
    "unfolded_on_error",
    "unmeasured_state",
    "unreached",
    "unwrapped",
    "weights_of",
    "with_change",
]
