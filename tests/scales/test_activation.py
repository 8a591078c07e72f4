"""Activation scales: the values that Gaudi cards gave, and soundness for every range, method, target and dtype."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from optimum_fp8.errors import FP8ConfigError, FP8ScaleError
from optimum_fp8.formats import FP8_DTYPES, HP_DTYPES, TARGETS, number_format
from optimum_fp8.scales import SCALE_METHODS, activation_scale, scale_method

HARDWARE_METHODS = [name for name, method in SCALE_METHODS.items() if method.activation.rounding == "hardware"]
EVERYWHERE = [(target, fp8) for target in TARGETS for fp8 in FP8_DTYPES]


def is_sound(scale):
    return bool((torch.isfinite(scale) & (scale > 0) & torch.isfinite(1 / scale)).all())


@pytest.mark.core
@pytest.mark.parametrize(
    "maxabs, expected", [(14.0625, 0.125), (7.03125, 0.0625), (1.7734375, 0.015625), (0.88671875, 0.0078125)]
)
def test_cards_multiply_by_the_reciprocal(maxabs, expected):
    assert activation_scale(maxabs, method="maxabs_hw", target="gaudi3").item() == expected


@pytest.mark.parametrize(
    "target, method, values",
    [
        (
            "gaudi2",
            "maxabs_hw",
            {0: 2**-8, 0.1162: 2**-8, 0.25: 2**-4, 4.40625: 1, 10.25: 1, 61: 16, 8000: 16},
        ),
        ("gaudi3", "maxabs_hw", {10.25: 0.125, 61: 1, 8000: 128}),
        ("gaudi2", "maxabs_pow2", {10.25: 0.25, 61: 2, 8000: 256}),
        ("gaudi2", "maxabs_arbitrary", {10.25: 0.171875}),  # the reciprocal rule; a division gives 0.1708984375
        ("cpu", "maxabs_arbitrary", {10.25: 0.09130859375}),
        ("cuda", "maxabs_arbitrary", {10.25: 0.09130859375}),
        ("cpu", "maxabs_hw", {10.25: 0.125, 61: 1, 8000: 128}),
    ],
)
def test_known_values(target, method, values):
    scales = activation_scale(torch.tensor(list(values)), method=method, target=target)
    assert scales.tolist() == list(values.values())


@pytest.mark.parametrize("target, fp8", EVERYWHERE)
@pytest.mark.parametrize("hp_dtype", HP_DTYPES)
@pytest.mark.parametrize("method", SCALE_METHODS)
def test_zero_range_is_sound(method, hp_dtype, target, fp8):
    scale = activation_scale(0.0, method=method, target=target, fp8_config=fp8, hp_dtype=hp_dtype)
    assert is_sound(scale)


@pytest.mark.parametrize(
    "method, target, expected",
    [
        ("maxabs_hw", "gaudi2", 2.0**-8),
        ("maxabs_hw", "gaudi3", 2.0**-55),
        ("maxabs_hw", "cpu", 1.0),
        ("maxabs_pow2", "gaudi2", 1.0),
        ("maxabs_arbitrary", "cuda", 1.0),
    ],
)
def test_zero_range_value(method, target, expected):
    assert activation_scale(0.0, method=method, target=target).item() == expected


@pytest.mark.parametrize("maxabs", [float("nan"), float("inf"), -1.0, -1e-30])
@pytest.mark.parametrize("method", ["maxabs_hw", "maxabs_arbitrary", "unit_scale"])
def test_no_range_is_an_error(method, maxabs):
    with pytest.raises(FP8ScaleError, match="not a range"):
        activation_scale(maxabs, method=method)
    with pytest.raises(FP8ScaleError, match="not a range"):
        activation_scale(torch.tensor([1.0, maxabs]), method=method)


@pytest.mark.core
@pytest.mark.parametrize("target, fp8", EVERYWHERE)
@pytest.mark.parametrize("hp_dtype", HP_DTYPES)
@settings(max_examples=10)
@given(ranges=st.lists(st.floats(1e-30, 1e30), min_size=1, max_size=20))
@example(ranges=[1e-30, 1e-7, 65504.0, 65520.0, 1e30])
def test_every_range_is_sound(target, fp8, hp_dtype, ranges):
    ranges = torch.tensor(ranges, dtype=torch.float32)
    for method in SCALE_METHODS:
        scale = activation_scale(ranges, method=method, target=target, fp8_config=fp8, hp_dtype=hp_dtype)
        assert scale.shape == ranges.shape and scale.dtype == torch.float32
        assert is_sound(scale), method


@pytest.mark.parametrize("target, fp8", EVERYWHERE)
@pytest.mark.parametrize("hp_dtype", HP_DTYPES)
@pytest.mark.parametrize("method", ["maxabs_pow2", "maxabs_arbitrary", "maxabs_pcs_pow2"])
@settings(max_examples=10)
@given(maxabs=st.floats(1e-25, 1e25))
@example(maxabs=1e-4).via("loses digits in float16")
@example(maxabs=65520.0).via("overflows in float16")
def test_range_fits_without_saturating(target, fp8, hp_dtype, method, maxabs):
    scale = activation_scale(maxabs, method=method, target=target, fp8_config=fp8, hp_dtype=hp_dtype).item()
    full_scale = number_format(fp8, target).full_scale
    backoff = scale_method(method).activation.backoff
    used = maxabs / scale / full_scale
    assert backoff / 2.1 < used < 1
    if hp_dtype == "fp32":
        assert used <= backoff * (1 + 1e-5)


@settings(max_examples=10)
@given(maxabs=st.floats(65536.0, 1e6))
@pytest.mark.parametrize("target", TARGETS)
def test_float16_does_not_overflow(target, maxabs):
    half = activation_scale(maxabs, method="maxabs_arbitrary", target=target, hp_dtype="fp16").item()
    assert half == pytest.approx(maxabs / (number_format("E4M3", target).full_scale * 0.25), rel=1e-6)


@pytest.mark.parametrize("target, fp8", EVERYWHERE)
@pytest.mark.parametrize("method", HARDWARE_METHODS)
@settings(max_examples=10)
@given(ranges=st.lists(st.floats(1e-30, 1e30), min_size=1, max_size=20))
def test_hardware_methods_stay_in_the_set(target, fp8, method, ranges):
    scales = activation_scale(torch.tensor([0.0, *ranges]), method=method, target=target, fp8_config=fp8)
    assert set(scales.tolist()) <= set(number_format(fp8, target).hardware_scales.descending())


@pytest.mark.parametrize("target", TARGETS)
@settings(max_examples=10)
@given(ranges=st.lists(st.floats(1e-30, 1e30), min_size=2, max_size=20))
def test_larger_range_never_gets_a_smaller_scale(target, ranges):
    for method in ("maxabs_hw", "maxabs_pow2", "maxabs_arbitrary"):
        scales = activation_scale(torch.tensor(sorted(ranges)), method=method, target=target)
        assert bool((scales.diff() >= 0).all())


@pytest.mark.parametrize(
    "method, target, expected",
    [
        ("unit_scale", "gaudi2", 1.0),
        ("unit_scale", "cpu", 1.0),
        ("hw_aligned_single_scale", "gaudi2", 16.0),
        ("hw_aligned_single_scale", "gaudi3", 128.0),
        ("hw_aligned_single_scale", "cuda", 1.0),
        ("hw_aligned_single_scale", "cpu", 1.0),
    ],
)
@pytest.mark.parametrize("maxabs", [0.0, 1e-3, 1e6])
def test_fixed_methods_ignore_the_range(method, target, expected, maxabs):
    assert activation_scale(maxabs, method=method, target=target).item() == expected


@pytest.mark.parametrize("shape", [(1,), (3,), (5, 1), (4, 1, 1, 1), (0,)])
def test_shapes(shape):
    for method in SCALE_METHODS:
        assert activation_scale(torch.ones(shape), method=method).shape == shape


@pytest.mark.parametrize("number", [2.5, torch.tensor(2.5)])
def test_number_gives_one_scale(number):
    assert activation_scale(number, method="maxabs_pow2").tolist() == [2.0**-5]


def test_backoff():
    common = {"method": "maxabs_pow2", "target": "cpu"}
    assert activation_scale(448.0, **common).item() == 4.0
    assert activation_scale(448.0, **common, dynamic=True).item() == 2.0
    assert activation_scale(448.0, **common, backoff=1.0).item() == 1.0
    assert activation_scale(448.0, **common, backoff=0.125, dynamic=True).item() == 8.0
    assert activation_scale(448.0, method="maxabs_pcs_pow2").item() == 2.0
    method, fmt = scale_method("maxabs_pow2"), number_format("E4M3", "gaudi2")
    assert (method.activation.divisor(fmt), method.dynamic_activation.divisor(fmt)) == (60.0, 120.0)


@pytest.mark.parametrize("backoff", [0.0, -0.5, 1.5, float("nan")])
def test_backoff_out_of_range(backoff):
    with pytest.raises(FP8ConfigError, match="backoff"):
        activation_scale(1.0, method="maxabs_pow2", backoff=backoff)


@pytest.mark.parametrize(
    "wrong, hint",
    [
        ({"method": "maxabs_h"}, "'maxabs_hw'"),
        ({"method": "maxabs_hw", "target": "gaudi1"}, "'gaudi"),
        ({"method": "maxabs_hw", "fp8_config": "E4M4"}, "'E4M3'"),
        ({"method": "maxabs_hw", "hp_dtype": "bf61"}, "'bf16'"),
    ],
)
def test_unknown_names_give_the_nearest(wrong, hint):
    with pytest.raises(FP8ConfigError, match=f"did you mean {hint}.*valid: "):
        activation_scale(1.0, **wrong)
