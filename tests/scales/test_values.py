"""The value rules: which of them need data, and what each makes of weights and of ranges."""

import pytest
import torch

from optimum_fp8.errors import FP8ScaleError
from optimum_fp8.formats import FP8_DTYPES, TARGETS, number_format
from optimum_fp8.scales import (
    VALUES,
    PerChannel,
    PerTensor,
    PerToken,
    ScaleRule,
    ScaleValue,
    scale_of_range,
    scale_of_weight,
)

BF16 = torch.bfloat16


@pytest.mark.parametrize("value", VALUES)
def test_only_what_is_fixed_needs_no_range(value):
    assert ScaleRule(PerTensor(), value, "pow2").needs_range is (value in ("maxabs", "search"))
    assert VALUES[value].only_range is (value == "maxabs")


@pytest.mark.parametrize("value, expected", [("unit", 1.0), ("first_hardware", 128.0)])
def test_fixed_values_ignore_the_data_and_keep_the_shape_of_ranges(value, expected):
    rule, fmt = ScaleRule(PerTensor(), value, "identity"), number_format("E4M3", "gaudi3")
    assert scale_of_weight(torch.randn(3, 4), rule, fmt, BF16).tolist() == [expected]
    ranges = scale_of_range(torch.tensor([[0.0], [9.0]]), rule, fmt, BF16)
    assert ranges.dtype == torch.float32 and ranges.tolist() == [[expected], [expected]]


@pytest.mark.parametrize("fp8", FP8_DTYPES)
@pytest.mark.parametrize("target", TARGETS)
def test_the_largest_value_is_mapped_to_its_part_of_the_full_scale(target, fp8):
    fmt, maxabs = number_format(fp8, target), 3.0
    for backoff in (1.0, 0.5, 0.3):
        rule = ScaleRule(PerTensor(), "maxabs", "identity", backoff)
        expected = pytest.approx(maxabs / (fmt.full_scale * backoff), rel=1e-6)
        assert scale_of_range(maxabs, rule, fmt, torch.float32).item() == expected
        assert scale_of_weight(torch.tensor([[-maxabs, 1.0]]), rule, fmt, torch.float32).item() == expected


def test_of_ranges_a_search_is_what_follows_from_the_range():
    ranges = torch.tensor([0.5, 100.0])
    found = [
        scale_of_range(ranges, ScaleRule(PerTensor(), value, "pow2", 0.25), number_format(), BF16)
        for value in ("search", "maxabs")
    ]
    assert torch.equal(*found)


@pytest.mark.parametrize("rounding, by_reciprocal", [("identity", True), ("pow2", False)])
def test_on_gaudi_only_ranges_per_tensor_are_multiplied_by_the_reciprocal(rounding, by_reciprocal):
    """Rounded to bfloat16, the reciprocal of 120 (240 · 0.5) makes another scale of some ranges than the division."""
    fmt, ranges = number_format("E4M3", "gaudi2"), torch.arange(1, 200, dtype=BF16)
    per_tensor, per_token = (
        scale_of_range(ranges, ScaleRule(granularity, "maxabs", rounding, 0.5), fmt, BF16)
        for granularity in (PerTensor(), PerToken())
    )
    division = ranges / 120
    assert torch.equal(
        per_token,
        division.float() if rounding == "identity" else division.float().log2().to(BF16).float().ceil().exp2(),
    )
    assert torch.equal(per_tensor, per_token) is not by_reciprocal


def test_channels_of_a_search_are_powers_of_two_around_the_range():
    weight, fmt = torch.randn(6, 32) * torch.logspace(-4, 4, 6)[:, None], number_format()
    found = scale_of_weight(weight, ScaleRule(PerChannel(), "search", "pow2", 0.5), fmt, BF16)
    plain = scale_of_weight(weight, ScaleRule(PerChannel(), "maxabs", "pow2", 0.5), fmt, BF16)
    assert found.shape == (6, 1) and set((found / plain).flatten().tolist()) <= {2.0**k for k in range(-3, 5)}
    assert torch.equal(found, found.log2().round().exp2())


@pytest.mark.parametrize(
    "given, text",
    [
        (0.5, "a scale in float: expected a tensor in torch.float32"),
        (torch.ones(1, dtype=torch.bfloat16), "a scale in torch.bfloat16: expected a tensor in torch.float32"),
        (torch.ones(3, 1), r"a scale of shape \(3, 1\) per channel: expected \(2, 1\)"),
        (torch.tensor([[1.0], [0.0]]), "a scale that"),
        (torch.tensor([[1.0], [float("nan")]]), "a scale that"),
    ],
)
def test_a_rule_of_ones_own_that_gives_no_scale_is_refused(monkeypatch, given, text):
    class Wrong(ScaleValue):
        def of_weight(self, weight, maxabs, rule, fmt, hp_dtype):
            return given

        def of_range(self, ranges, rule, fmt, hp_dtype):
            return given

    monkeypatch.setitem(VALUES, "wrong", Wrong())
    rule = ScaleRule(PerChannel(), "wrong", "identity")
    with pytest.raises(FP8ScaleError, match=f"the value rule 'wrong' gave {text}"):
        scale_of_weight(torch.ones(2, 3), rule, number_format(), BF16)
    with pytest.raises(FP8ScaleError, match=f"the value rule 'wrong' gave {text}"):
        scale_of_range(torch.ones(2, 1), rule, number_format(), BF16)
