"""Weights brought to another number format: values stay, and what must be rounded again is little, and counted.

The oracle is float64 arithmetic on the values that torch's own casts give to codes.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from scale_methods import FOR_ANY_SHAPE

from optimum_fp8.formats import number_format
from optimum_fp8.scales import PerBlock, PerChannel, PerTensor, ScaleRule, fit_weight, quantize_weight
from optimum_fp8.scales.fit import always_fits

E4M3 = torch.float8_e4m3fn
RULES = {name: method.weight for name, method in FOR_ANY_SHAPE.items()}
TARGETS = ("gaudi2", "gaudi3", "cpu")
PAIRS = list(itertools.permutations(TARGETS, 2))
GAUDI2 = (16.0, 1.0, 2.0**-4, 2.0**-8)


def weight(spread: float = 0.05, seed: int = 0) -> torch.Tensor:
    return torch.randn(16, 32, generator=torch.Generator().manual_seed(seed)).mul(spread).bfloat16()


def every_code() -> torch.Tensor:
    """All positive E4M3 codes, 1 to 0x7E."""
    return torch.arange(1, 0x7F, dtype=torch.uint8).view(E4M3)


def values(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return codes.double() * scale.double()


def cast(x: torch.Tensor, dtype: torch.dtype, full_scale: float) -> torch.Tensor:
    return x.float().clamp(-full_scale, full_scale).to(dtype).double()


def in_set(scale: torch.Tensor, target: str) -> bool:
    return set(scale.flatten().tolist()) <= set(number_format("E4M3", target).hardware_scales.descending())


# --- against another rule -------------------------------------------------------------------------------------------


def test_half_rounds_8_of_126_codes_again_where_240_of_448_rounds_112():
    codes = every_code()
    fitted, scale, rounded = fit_weight(codes, torch.ones(1), RULES["maxabs_pow2"], number_format("E4M3", "gaudi2"))
    error = (values(fitted, scale) / codes.double() - 1).abs()
    assert rounded == 8 == int((error > 0).sum())
    assert not error[codes.double() >= 2**-5].any(), "only what becomes subnormal is rounded"

    theirs = cast(codes.double() * (240 / 448), E4M3, 240.0) * (448 / 240)
    error = (theirs / codes.double() - 1).abs()
    assert int((error > 1e-9).sum()) == 112
    assert 0.025 < float(error[codes.double() >= 2**-6].square().mean().sqrt()) < 0.03


# --- against quantizing the original --------------------------------------------------------------------------------


@pytest.mark.parametrize("fp8", ["E4M3", "E5M2"])
@pytest.mark.parametrize("made_for, to", PAIRS)
@pytest.mark.parametrize("method", FOR_ANY_SHAPE)
@pytest.mark.parametrize("spread", [0.05, 3.0])
def test_what_is_fitted_fits_and_is_as_near_to_the_original_as_what_was_made_for_the_target(
    fp8, made_for, to, method, spread
):
    original, rule = weight(spread), RULES[method]
    before, after = number_format(fp8, made_for), number_format(fp8, to)
    codes, scale, _ = quantize_weight(original, rule, before, torch.bfloat16)
    fitted, new_scale, rounded = fit_weight(codes, scale, rule, after)

    assert fitted.dtype == codes.dtype and fitted.shape == codes.shape and new_scale.shape == scale.shape
    assert float(fitted.float().abs().max()) <= after.full_scale
    assert rule.rounding != "hardware" or in_set(new_scale, to)
    change = (values(fitted, new_scale) - values(codes, scale)).abs()
    assert rounded == int((change > 0).sum())
    smallest = float(torch.tensor([1], dtype=torch.uint8).view(codes.dtype).double())
    assert (change <= new_scale.double() * smallest / 2).all(), "half of a subnormal step at most"

    direct, direct_scale, _ = quantize_weight(original, rule, after, torch.bfloat16)
    if torch.equal(direct_scale, new_scale):
        apart = (values(fitted, new_scale) - values(direct, direct_scale)).abs()
        step = torch.maximum(scale, new_scale).double() * smallest
        assert (apart <= step).all(), "one subnormal step, by rounding twice"
        assert int((apart > 0).sum()) <= rounded or bool((scale > new_scale).any())
    errors = [(values(*each) - original.double()).norm() for each in ((codes, scale), (direct, direct_scale))]
    assert (values(fitted, new_scale) - original.double()).norm() <= max(errors) * 1.01


@pytest.mark.parametrize("made_for, to", [("gaudi2", "gaudi3"), ("gaudi2", "cpu"), ("gaudi3", "cpu")])
@pytest.mark.parametrize("method", FOR_ANY_SHAPE)
def test_to_a_wider_format_nothing_changes(made_for, to, method):
    before, after, rule = number_format("E4M3", made_for), number_format("E4M3", to), RULES[method]
    codes, scale, _ = quantize_weight(weight(), rule, before, torch.bfloat16)
    fitted, new_scale, rounded = fit_weight(codes, scale, rule, after)
    assert fitted is codes and new_scale is scale and rounded == 0 and always_fits(rule, before, after)


def test_whether_weights_always_fit():
    formats = {target: number_format("E4M3", target) for target in TARGETS}
    hardware, pow2 = RULES["maxabs_hw"], RULES["maxabs_pow2"]
    fit = {pair for pair in PAIRS if always_fits(hardware, formats[pair[0]], formats[pair[1]])}
    assert fit == {("gaudi2", "gaudi3"), ("gaudi2", "cpu"), ("gaudi3", "cpu")}
    fit = {pair for pair in PAIRS if always_fits(pow2, formats[pair[0]], formats[pair[1]])}
    assert fit == {pair for pair in PAIRS if pair[1] != "gaudi2"}
    assert always_fits(pow2, number_format("E5M2", "cpu"), number_format("E5M2", "gaudi2"))


# --- which scale ----------------------------------------------------------------------------------------------------


@pytest.mark.core
@pytest.mark.parametrize("exponent", range(-14, 10))
@pytest.mark.parametrize("kept", ["all", "coarse", "small", "even"])
def test_the_hardware_scale_is_the_nearest_that_loses_nothing_else_the_smallest_that_saturates_nothing(exponent, kept):
    some = every_code()
    x = some.double()
    some = some[{"all": x > 0, "coarse": x >= 2, "small": x <= 15, "even": (x * 32 % 1 == 0) & (x < 200)}[kept]]
    scale = torch.tensor([2.0**exponent])
    fitted, new_scale, rounded = fit_weight(some, scale, RULES["maxabs_hw"], number_format("E4M3", "gaudi2"))
    lost, saturates = {}, {}
    for hardware in GAUDI2:
        moved = values(some, scale) / hardware
        lost[hardware] = int((cast(moved, E4M3, 240.0) != moved).sum())
        saturates[hardware] = bool((moved > 240).any())
    if exact := [hardware for hardware in GAUDI2 if not lost[hardware]]:
        distance = {hardware: abs(torch.tensor(hardware / scale.item()).log2().item()) for hardware in exact}
        assert distance[new_scale.item()] == min(distance.values())
    else:
        assert new_scale.item() == min((each for each in GAUDI2 if not saturates[each]), default=16.0)
    assert rounded == lost[new_scale.item()]
    assert torch.equal(fitted.double(), cast(values(some, scale) / new_scale.double(), E4M3, 240.0))


def test_only_channels_with_codes_above_the_full_scale_are_halved():
    codes = torch.tensor([[448.0, 2**-9], [240.0, 2**-9], [-256.0, 1.0], [0.0, 0.0]]).to(E4M3)
    scale = torch.tensor([[0.5], [0.25], [1.0], [3.0]])
    rule = ScaleRule(PerChannel(), "maxabs", "pow2", 1.0)
    fitted, new_scale, rounded = fit_weight(codes, scale, rule, number_format("E4M3", "gaudi2"))
    assert new_scale.tolist() == [[1.0], [0.25], [2.0], [3.0]]
    assert fitted.float().tolist() == [[224.0, 0.0], [240.0, 2**-9], [-128.0, 0.5], [0.0, 0.0]] and rounded == 1


def test_blocks_are_fitted_one_by_one():
    codes = torch.ones(256, 128).to(E4M3)
    codes[3, 5] = 448.0
    rule = ScaleRule(PerBlock(128, 128), "maxabs", "hardware")
    scale = torch.tensor([[2.0**-8], [2.0**-7]])
    fitted, new_scale, rounded = fit_weight(codes, scale, rule, number_format("E4M3", "gaudi2"))
    assert new_scale.tolist() == [[2.0**-4], [2.0**-8]] and rounded == 0
    assert fitted[:128].float().unique().tolist() == [2**-4, 28.0] and fitted[128:].float().unique().tolist() == [2.0]


def test_a_scale_that_is_no_power_of_two_is_doubled_as_well():
    codes, scale = torch.tensor([[400.0, 3.0]]).to(E4M3), torch.tensor([0.3])
    rule = ScaleRule(PerTensor(), "maxabs", "identity", 1.0)
    fitted, new_scale, rounded = fit_weight(codes, scale, rule, number_format("E4M3", "gaudi2"))
    assert new_scale.item() == 2 * scale.item() and rounded == 0
    assert fitted.float().tolist() == [[codes.float()[0, 0].item() / 2, 1.5]]


def test_where_no_hardware_scale_is_large_enough_weights_saturate_and_count():
    codes, scale = torch.tensor([[448.0, 1.0]]).to(E4M3), torch.tensor([2.0**10])
    fitted, new_scale, rounded = fit_weight(codes, scale, RULES["maxabs_hw"], number_format("E4M3", "gaudi2"))
    assert (new_scale.item(), fitted.float().tolist(), rounded) == (16.0, [[240.0, 64.0]], 1)
