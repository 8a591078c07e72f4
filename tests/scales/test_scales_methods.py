"""The table of scale methods, row by row: granularity, value, rounding and backoff of the weight and the activation."""

import pytest

from optimum_fp8.errors import FP8ConfigError
from optimum_fp8.scales import SCALE_METHODS, ScaleRule, scale_method

UNIT = ("tensor", "unit", "identity", 1.0)
SINGLE = ("tensor", "first_hardware", "hardware", 1.0)
W_HW, W_POW2 = ("tensor", "maxabs", "hardware", 0.5), ("tensor", "maxabs", "pow2", 0.5)
W_ARBITRARY = ("tensor", "maxabs", "identity", 0.5)
W_OPT_HW, W_OPT_POW2 = ("tensor", "search", "hardware", 0.5), ("tensor", "search", "pow2", 0.5)
PCS_POW2, PCS_OPT = ("channel", "maxabs", "pow2", 0.5), ("channel", "search", "pow2", 0.5)
A_HW, A_POW2 = ("tensor", "maxabs", "hardware", 0.25), ("tensor", "maxabs", "pow2", 0.25)
A_ARBITRARY, TOKEN = ("tensor", "maxabs", "identity", 0.25), ("token", "maxabs", "pow2", 0.5)

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
}


def row(rule):
    return rule.granularity, rule.value, rule.rounding, rule.backoff


@pytest.mark.core
def test_table():
    assert {name: (row(method.weight), row(method.activation)) for name, method in SCALE_METHODS.items()} == TABLE


def test_per_token_methods_are_dynamic_only():
    assert {name for name, method in SCALE_METHODS.items() if method.dynamic_only} == {
        "act_maxabs_pcs_pow2_weight_maxabs_pts_pow2_hw",
        "maxabs_pcs_pow2",
    }


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
    assert ScaleRule("tensor", value, "pow2").needs_range is needs
