"""The table of scale methods, row by row: granularity, value, rounding and backoff of the weight and the activation."""

import pytest

from optimum_fp8.errors import FP8ConfigError
from optimum_fp8.scales import (
    SCALE_METHODS,
    PerBlock,
    PerChannel,
    PerGroup,
    PerHead,
    PerTensor,
    PerToken,
    ScaleMethod,
    ScaleRule,
    register_method,
    scale_method,
)

UNIT = (PerTensor(), "unit", "identity", 1.0)
SINGLE = (PerTensor(), "first_hardware", "hardware", 1.0)
W_HW, W_POW2 = (PerTensor(), "maxabs", "hardware", 0.5), (PerTensor(), "maxabs", "pow2", 0.5)
W_ARBITRARY = (PerTensor(), "maxabs", "identity", 0.5)
W_OPT_HW, W_OPT_POW2 = (PerTensor(), "search", "hardware", 0.5), (PerTensor(), "search", "pow2", 0.5)
PCS_POW2, PCS_OPT = (PerChannel(), "maxabs", "pow2", 0.5), (PerChannel(), "search", "pow2", 0.5)
A_HW, A_POW2 = (PerTensor(), "maxabs", "hardware", 0.25), (PerTensor(), "maxabs", "pow2", 0.25)
A_ARBITRARY, TOKEN = (PerTensor(), "maxabs", "identity", 0.25), (PerToken(), "maxabs", "pow2", 0.5)
FULL, FULL_PCS = (PerTensor(), "maxabs", "identity", 1.0), (PerChannel(), "maxabs", "identity", 1.0)


def microscaled(rounding):
    return PerGroup(32), "maxabs", rounding, 1.0


TABLE = {
    "unit_scale": (UNIT, UNIT),
    "hw_aligned_single_scale": (SINGLE, SINGLE),
    "maxabs_hw": (W_HW, A_HW),
    "maxabs_pow2": (W_POW2, A_POW2),
    "maxabs_arbitrary": (W_ARBITRARY, A_ARBITRARY),
    "maxabs_hw_opt_weight": (W_OPT_HW, A_HW),
    "maxabs_pow2_opt_weight": (W_OPT_POW2, A_POW2),
    "act_maxabs_hw_weights_pcs_maxabs_pow2": (PCS_POW2, A_HW),
    "act_maxabs_hw_weights_pcs_opt_pow2": (PCS_OPT, A_HW),
    "act_maxabs_pow2_weights_pcs_maxabs_pow2": (PCS_POW2, A_POW2),
    "act_maxabs_pow2_weights_pcs_opt_pow2": (PCS_OPT, A_POW2),
    "act_maxabs_pcs_pow2_weight_maxabs_pts_pow2_hw": (W_HW, TOKEN),
    "maxabs_pcs_pow2": (PCS_POW2, TOKEN),
    "full_range": (FULL, FULL),
    "full_range_pcs": (FULL_PCS, FULL),
    "full_range_by_tensor": (FULL, FULL),
    "full_range_pcs_by_tensor": (FULL_PCS, FULL),
    "block_128_e8m0": (
        (PerBlock(128, 128), "maxabs", "identity", 1.0),
        (PerGroup(128), "maxabs", "e8m0_ceil", 1.0),
    ),
    "block_128": ((PerBlock(128, 128), "maxabs", "identity", 1.0), (PerGroup(128), "maxabs", "identity", 1.0)),
    "mxfp8": (microscaled("e8m0_ceil"), microscaled("e8m0_ceil")),
    "mxfp8_above": (microscaled("e8m0_above"), microscaled("e8m0_above")),
    "mxfp8_floor": (microscaled("e8m0_floor"), microscaled("e8m0_floor")),
}


def row(rule):
    return rule.granularity, rule.value, rule.rounding, rule.backoff


@pytest.mark.core
def test_table():
    assert {name: (row(method.weight), row(method.activation)) for name, method in SCALE_METHODS.items()} == TABLE


def test_methods_that_scale_tokens_or_groups_are_dynamic_only():
    assert {name for name, method in SCALE_METHODS.items() if method.dynamic_only} == {
        "act_maxabs_pcs_pow2_weight_maxabs_pts_pow2_hw",
        "maxabs_pcs_pow2",
        "block_128",
        "block_128_e8m0",
        "mxfp8",
        "mxfp8_above",
        "mxfp8_floor",
    }


def test_dynamic_scales_take_no_more_headroom_than_calibrated_ones():
    assert row(scale_method("maxabs_hw").dynamic_activation) == (PerToken(), "maxabs", "hardware", 0.5)
    assert row(scale_method("maxabs_pow2").dynamic_activation) == (PerTensor(), "maxabs", "pow2", 0.5)
    assert row(scale_method("full_range").dynamic_activation) == (PerToken(), "maxabs", "identity", 1.0)
    assert row(scale_method("block_128").dynamic_activation) == (PerGroup(128), "maxabs", "identity", 1.0)


@pytest.mark.parametrize("name", TABLE)
def test_lookup_ignores_case(name):
    assert scale_method(name) is scale_method(name.upper()) is SCALE_METHODS[name]
    assert SCALE_METHODS[name].name == name


@pytest.mark.parametrize(
    "wrong, hint",
    [
        ("maxabs_hv", "did you mean 'maxabs_hw'"),
        ("MAXABS_POW", "did you mean 'maxabs_pow2'"),
        ("act_maxabs_hw_weights_pcs_maxabs", "did you mean 'act_maxabs_hw_weights_pcs_maxabs_pow2'"),
        ("zzz", "'zzz' is unknown: valid: unit_scale, "),
        (None, "None is unknown"),
    ],
)
def test_unknown_method(wrong, hint):
    with pytest.raises(FP8ConfigError, match=hint):
        scale_method(wrong)


@pytest.mark.parametrize(
    "value, needs", [("maxabs", True), ("search", True), ("unit", False), ("first_hardware", False)]
)
def test_what_needs_a_range(value, needs):
    assert ScaleRule(PerTensor(), value, "pow2").needs_range is needs


GOOD = ScaleRule(PerTensor(), "maxabs", "pow2", 0.5)


@pytest.mark.parametrize(
    "weight, activation, text",
    [
        (ScaleRule(PerToken(), "maxabs", "pow2"), GOOD, "scales weights per token, which weights cannot be"),
        (ScaleRule(PerHead(), "maxabs", "pow2"), GOOD, "scales weights per head, which weights cannot be"),
        (GOOD, ScaleRule(PerChannel(), "maxabs", "pow2"), "activations per channel, which activations cannot be"),
        (GOOD, ScaleRule(PerBlock(128, 128), "maxabs", "pow2"), "which activations cannot be"),
    ],
)
def test_a_granularity_that_the_tensor_does_not_have_is_refused(weight, activation, text):
    with pytest.raises(FP8ConfigError, match=text):
        ScaleMethod("mine", weight, activation)


@pytest.mark.parametrize(
    "rule, text",
    [
        (ScaleRule(PerTensor(), "maxab", "pow2"), "'maxab' of a scale is unknown: did you mean 'maxabs'"),
        (ScaleRule(PerTensor(), "maxabs", "pow3"), "'pow3' is unknown: did you mean 'pow2'"),
        (ScaleRule(PerTensor(), "maxabs", "pow2", 1.5), "backoff"),
    ],
)
def test_a_method_of_what_is_not_known_is_not_registered(rule, text):
    for pair in ((rule, GOOD), (GOOD, rule)):
        with pytest.raises(FP8ConfigError, match=text):
            register_method(ScaleMethod("mine", *pair))
    assert "mine" not in SCALE_METHODS
