"""Rounding of scales: exact powers of two, hardware sets, and soundness at the edges of each dtype."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from optimum_fp8.formats import FP8_DTYPES, MIN_EXPONENT, TARGETS, number_format
from optimum_fp8.rounding import ROUNDINGS, ceil_log2, exp2, round_scale, scale_from_maxabs

CPU = number_format("E4M3", "cpu")
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def is_sound(scale):
    return bool((torch.isfinite(scale) & (scale > 0) & torch.isfinite(1 / scale)).all())


def test_exp2_is_exact():
    exponents = torch.arange(-126, 128)
    assert exp2(exponents).tolist() == [2.0**e for e in range(-126, 128)]
    assert torch.equal(exp2(exponents.float()), exp2(exponents))


@pytest.mark.parametrize("exponent", range(-100, 101, 20))
def test_ceil_log2_of_powers_of_two(exponent):
    raw = torch.tensor([2.0**exponent, 2.0**exponent * 1.5], dtype=torch.bfloat16)
    assert ceil_log2(raw).tolist() == [exponent, exponent + 1]
    assert ceil_log2(torch.zeros(1)).item() == -math.inf


@pytest.mark.parametrize("dtype", DTYPES)
def test_powers_of_two_are_kept(dtype):
    """log2 of a power of two must be exact, in the vectorized loop and in its scalar remainder."""
    low, high = (-14, 15) if dtype == torch.float16 else (-126, 126)
    powers = torch.tensor([2.0**e for e in range(low, high + 1)]).to(dtype)
    assert torch.equal(round_scale(powers, "pow2", CPU), powers.float())
    assert all(round_scale(power, "pow2", CPU) == power for power in powers)


def test_log2_is_rounded_in_the_dtype_of_the_scale():
    hair_above = 32.25
    assert round_scale(torch.tensor([hair_above], dtype=torch.bfloat16), "pow2", CPU).item() == 32
    assert round_scale(torch.tensor([hair_above]), "pow2", CPU).item() == 64


@given(raw=st.floats(2.0**-120, 2.0**120, width=32))
@settings(max_examples=100)
def test_pow2_is_the_next_power_of_two(raw):
    exponent = math.ceil(math.log2(raw))
    rounded = round_scale(torch.tensor([raw]), "pow2", CPU).item()
    if abs(math.log2(raw) - round(math.log2(raw))) > 1e-4:
        assert rounded == 2.0**exponent
    assert math.frexp(rounded)[0] == 0.5 and 0.99 <= rounded / raw < 2.01


@pytest.mark.parametrize(
    "target, raws, expected",
    [
        ("gaudi2", [0, 1e-9, 2**-8, 0.0625, 0.07, 1, 1.1, 16, 17, 1e9], [2**-8, 2**-8, 2**-8, 2**-4, 1, 1] + [16] * 4),
        ("gaudi3", [0, 1e-30, 0.07, 1, 1.1, 100, 129, 1e9], [2**-55, 2**-55, 0.125, 1, 2, 128, 128, 128]),
        ("cpu", [1e-38, 0.07, 1.1, 129, 1e38], [2**-126, 0.125, 2, 256, 2**126]),
    ],
)
def test_hardware_rounds_up_and_clamps(target, raws, expected):
    fmt = number_format("E4M3", target)
    assert round_scale(torch.tensor(raws, dtype=torch.float32), "hardware", fmt).tolist() == expected


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("target", TARGETS)
def test_edges_of_the_dtype_are_sound(target, rounding, dtype):
    info = torch.finfo(dtype)
    raw = torch.tensor([0, info.smallest_normal / 4, info.tiny, 1, info.max, math.inf], dtype=dtype)
    scale = round_scale(raw, rounding, number_format("E4M3", target))
    assert scale.dtype == torch.float32 and is_sound(scale)


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_nan_does_not_become_a_scale_that_spoils_all(rounding):
    assert is_sound(round_scale(torch.tensor([math.nan]), rounding, CPU))


@pytest.mark.parametrize("shape", [(), (1,), (0,), (3, 1), (2, 1, 1, 1)])
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_shape_is_kept(rounding, shape):
    assert round_scale(torch.ones(shape), rounding, CPU).shape == shape
    assert scale_from_maxabs(torch.ones(shape), 112.0, rounding, CPU, torch.bfloat16).shape == shape


def test_identity_keeps_the_scale():
    raw = torch.tensor([1e-30, 0.1, 3.0, 1e30])
    assert torch.equal(round_scale(raw, "identity", CPU), raw)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("fp8", FP8_DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_zero_range(rounding, dtype, fp8, target):
    fmt = number_format(fp8, target)
    scale = scale_from_maxabs(torch.tensor([0.0, 1.0]), fmt.full_scale, rounding, fmt, dtype)
    lowest = fmt.hardware_scales.descending()[-1]
    assert scale[0].item() == (lowest if rounding == "hardware" and fmt.is_gaudi else 1.0)
    assert is_sound(scale)


def test_reciprocal_or_division():
    maxabs, gaudi3 = torch.tensor([14.0625]), number_format("E4M3", "gaudi3")
    common = (maxabs, 112.0, "hardware", gaudi3, torch.bfloat16)
    assert scale_from_maxabs(*common, reciprocal=True).item() == 0.125
    assert scale_from_maxabs(*common).item() == 0.25


@pytest.mark.parametrize("maxabs", [1e-12, 1e-9, 65519.0, 65521.0, 1e6, 1e30])
@pytest.mark.parametrize("reciprocal", [True, False])
def test_float16_falls_back_to_float32_where_it_has_no_value(maxabs, reciprocal):
    common = (torch.tensor([maxabs]), 112.0, "identity", CPU)
    half = scale_from_maxabs(*common, torch.float16, reciprocal=reciprocal).item()
    full = scale_from_maxabs(*common, torch.float32, reciprocal=reciprocal).item()
    assert half == pytest.approx(full, rel=2e-3)


@pytest.mark.parametrize(
    "maxabs, ceil, above, floor",
    [
        (448.0, 0, 1, 0),
        (447.9, 0, 0, 0),
        (448.1, 1, 1, 0),
        (511.9, 1, 1, 0),
        (512.0, 1, 1, 1),
        (256.0, 0, 0, 0),
        (255.9, 0, 0, -1),
        (3.5, -7, -6, -7),
        (1.0, -8, -8, -8),
        (0.0, MIN_EXPONENT, MIN_EXPONENT, MIN_EXPONENT),
    ],
)
def test_e8m0_rules(maxabs, ceil, above, floor):
    """The exponents that OCP's formula and the two of common libraries give for a range, worked out by hand."""
    raw = torch.tensor([maxabs]) / 448
    found = {name: round_scale(raw, f"e8m0_{name}", CPU).log2().item() for name in ("ceil", "above", "floor")}
    assert found == {"ceil": ceil, "above": above, "floor": floor}


@given(maxabs=st.floats(2.0**-100, 2.0**100, width=32))
@settings(max_examples=200)
def test_e8m0_rules_are_those_of_the_mantissa(maxabs):
    mantissa, exponent = math.frexp(maxabs)
    mantissa, exponent = 2 * mantissa, exponent - 1
    raw = torch.tensor([maxabs]) / 448
    assert round_scale(raw, "e8m0_floor", CPU).item() == 2.0 ** (exponent - 8)
    if abs(mantissa - 1.75) > 1e-6:  # the division has rounded
        wanted = 2.0 ** (exponent - 8 + (mantissa > 1.75))
        assert round_scale(raw, "e8m0_ceil", CPU).item() == round_scale(raw, "e8m0_above", CPU).item() == wanted


@pytest.mark.parametrize("rounding", [name for name in ROUNDINGS if name.startswith("e8m0")])
def test_e8m0_of_what_is_no_range(rounding):
    assert is_sound(round_scale(torch.tensor([0.0, math.inf, math.nan, 1e-45, 3e38]), rounding, CPU))
