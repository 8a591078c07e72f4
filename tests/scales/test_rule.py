"""Rules of scales: backoffs, texts, value rules and roundings registered from outside, weights by blocks and groups."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import nn

from optimum_fp8 import FP8Config, convert
from optimum_fp8.errors import FP8ConfigError, FP8ScaleError
from optimum_fp8.formats import number_format
from optimum_fp8.rounding import ROUNDINGS, register_rounding
from optimum_fp8.scales import (
    SCALE_METHODS,
    VALUES,
    PerBlock,
    PerChannel,
    PerGroup,
    PerTensor,
    ScaleMethod,
    ScaleRule,
    ScaleValue,
    quantize_weight,
    register_method,
    register_value,
)

NUMPY_DTYPES = {"E4M3": ml_dtypes.float8_e4m3fn, "E5M2": ml_dtypes.float8_e5m2}
FP32 = torch.float32


@pytest.fixture(autouse=True)
def registries():
    """What a test registers is gone after it."""
    tables = (VALUES, ROUNDINGS, SCALE_METHODS)
    before = [dict(table) for table in tables]
    yield
    for table, entries in zip(tables, before, strict=True):
        table.clear()
        table.update(entries)


# --- weights by blocks and groups ---------------------------------------------------------------------------------


def expected_codes(weight, rows, columns, full_scale, backoff, rounding, dtype):
    """Codes and scales block by block: the scale in the weight's dtype, the codes in float32."""
    values = weight.float().numpy()
    codes = np.empty(values.shape, NUMPY_DTYPES[dtype])
    scales = np.empty([-(-values.shape[0] // rows), -(-values.shape[1] // columns)], np.float32)
    for i, j in np.ndindex(*scales.shape):
        block = (slice(i * rows, (i + 1) * rows), slice(j * columns, (j + 1) * columns))
        kept = ml_dtypes.bfloat16 if weight.dtype == torch.bfloat16 else np.float32  # ranges and logarithms are too
        raw = (np.abs(values[block]).max() / np.float32(full_scale * backoff)).astype(kept).astype(np.float32)
        logarithm = np.log2(raw).astype(kept).astype(np.float32)
        scale = raw if rounding == "identity" else np.float32(2.0 ** np.ceil(logarithm))
        scaled = values[block] * (np.float32(1) / scale)
        codes[block], scales[i, j] = np.clip(scaled, -full_scale, full_scale).astype(codes.dtype), scale
    return codes, scales


@pytest.mark.core
@pytest.mark.parametrize("shape", [(128, 128), (200, 300), (3, 40)])
@pytest.mark.parametrize("granularity", [PerBlock(128, 128), PerGroup(128), PerGroup(32)], ids=str)
@pytest.mark.parametrize("rounding", ["identity", "pow2"])
@pytest.mark.parametrize("name, target", [("E4M3", "cpu"), ("E4M3", "gaudi2"), ("E5M2", "cuda")])
def test_weights_by_blocks_and_groups(shape, granularity, rounding, name, target):
    rows, columns = (
        (granularity.rows, granularity.columns) if isinstance(granularity, PerBlock) else (1, granularity.size)
    )
    fmt, weight = number_format(name, target), torch.randn(shape) * torch.logspace(-2, 2, shape[0])[:, None]
    weight[: shape[0] // 2, :40] *= 1000
    for case in (weight, weight.bfloat16(), weight.mT.contiguous().mT):
        rule = ScaleRule(granularity, "maxabs", rounding, 0.5)
        codes, scale, maxabs = quantize_weight(case, rule, fmt, FP32)
        values, scales = expected_codes(case, rows, columns, fmt.full_scale, 0.5, rounding, name)
        assert np.array_equal(scale.numpy(), scales), "scales"
        assert np.array_equal(codes.view(torch.uint8).numpy(), values.view(np.uint8)), "codes"
        assert codes.is_contiguous() and codes.dtype is fmt.dtype
        assert maxabs.dtype == FP32 and maxabs.amax() == case.abs().amax().float()


@pytest.mark.parametrize("granularity", [PerBlock(128, 128), PerGroup(32)], ids=str)
@pytest.mark.parametrize("dtype", [FP32, torch.bfloat16, torch.float16])
def test_blocks_of_zeros_have_a_sound_scale_and_stay_zeros(granularity, dtype):
    weight = torch.zeros(130, 160, dtype=dtype)
    weight[129, 159] = 3.0
    codes, scale, _ = quantize_weight(weight, ScaleRule(granularity, "maxabs", "pow2", 0.5), number_format(), FP32)
    assert bool((scale > 0).all()) and bool((1 / scale).isfinite().all())
    assert codes.float().count_nonzero() == 1 and codes[129, 159].float() * scale[-1, -1] == 3.0


@pytest.mark.parametrize("granularity", [PerTensor(), PerChannel(), PerBlock(128, 128), PerGroup(32)], ids=str)
@pytest.mark.parametrize("bad", [float("nan"), float("-inf")])
@pytest.mark.parametrize("dtype", [FP32, torch.bfloat16])
def test_what_is_not_finite_is_refused_at_every_granularity(granularity, bad, dtype):
    weight = torch.ones(140, 40, dtype=dtype)
    weight[139, 39] = bad
    with pytest.raises(FP8ScaleError, match="the weight holds NaN or Inf"):
        quantize_weight(weight, ScaleRule(granularity, "maxabs", "pow2"), number_format(), FP32)
    with pytest.raises(FP8ScaleError, match=r"the weight of shape \(0, 40\) is empty"):
        quantize_weight(weight[:0], ScaleRule(granularity, "maxabs", "pow2"), number_format(), FP32)


@pytest.mark.parametrize("granularity", [PerBlock(128, 128), PerGroup(32)], ids=str)
def test_a_search_knows_no_blocks_and_says_what_it_knows(granularity):
    rule = ScaleRule(granularity, "search", "pow2")
    with pytest.raises(FP8ConfigError, match=rf"a search {granularity}: expected per tensor or per channel"):
        quantize_weight(torch.ones(4, 40), rule, number_format(), FP32)


@pytest.mark.parametrize("granularity", [PerBlock(100, 100), PerBlock(64, 128), PerGroup(100), PerGroup(64)], ids=str)
def test_sizes_that_operators_would_take_for_others_are_refused(granularity):
    """Of 200 values, two groups of 100 have as many scales as groups of 128."""
    with pytest.raises(
        FP8ConfigError, match=rf"a scale {granularity} is not .*: expected blocks of 128×128, or groups"
    ):
        ScaleRule(granularity, "maxabs", "pow2")
    assert ScaleRule(PerBlock(1, 32), "maxabs", "pow2").granularity.fits_operators


# --- rules as values ----------------------------------------------------------------------------------------------


def test_with_backoff():
    rule = ScaleRule(PerTensor(), "maxabs", "pow2", 0.25)
    assert rule.with_backoff(None) is rule and rule.with_backoff(0.25) is rule
    assert rule.with_backoff(0.5) == ScaleRule(PerTensor(), "maxabs", "pow2", 0.5)
    assert rule.with_backoff(1.0).divisor(number_format("E4M3", "gaudi2")) == 240.0
    assert rule.divisor(number_format("E5M2")) == 57344 / 4


@pytest.mark.parametrize("backoff", [0.0, -1.0, 1.01, float("nan")])
def test_a_backoff_that_cannot_be_is_refused(backoff):
    with pytest.raises(FP8ConfigError, match="backoff=.* is out of range: expected 0 < backoff <= 1"):
        ScaleRule(PerTensor(), "maxabs", "pow2").with_backoff(backoff)


@pytest.mark.parametrize(
    "rule, text",
    [
        (ScaleRule(PerTensor(), "maxabs", "identity"), "per tensor maxabs"),
        (ScaleRule(PerBlock(128, 128), "maxabs", "pow2"), "per block 128×128 maxabs pow2"),
        (ScaleRule(PerChannel(), "search", "hardware"), "per channel search hardware"),
    ],
    ids=str,
)
def test_how_reports_name_a_rule(rule, text):
    assert str(rule) == text


# --- from outside -------------------------------------------------------------------------------------------------


class SecondLargest(ScaleValue):
    """A toy: the largest value may saturate."""

    only_range = False

    def of_weight(self, weight, maxabs, rule, fmt, hp_dtype):
        second = weight.flatten().abs().float().topk(2).values[1:]
        return ROUNDINGS[rule.rounding](second / rule.divisor(fmt), fmt)

    def of_range(self, ranges, rule, fmt, hp_dtype):
        return ROUNDINGS[rule.rounding](ranges.float() / rule.divisor(fmt), fmt)


def test_a_value_rule_and_a_rounding_from_outside_make_a_method_of_the_configuration():
    register_value("second", SecondLargest())
    register_rounding("thirds", lambda raw, fmt: (raw.float() * 3).ceil() / 3)
    rule = ScaleRule(PerTensor(), "second", "thirds", 1.0)
    register_method(ScaleMethod("second_largest", rule, rule))

    layer = nn.Linear(4, 1, bias=False)
    layer.weight.data = torch.tensor([[1.0, 600.0, -5000.0, 2.0]])
    model = convert(nn.Sequential(layer), FP8Config(scale_method="second_largest", activation_scheme="weight_only"))
    assert model[0].weight_scale.tolist() == [pytest.approx(5 / 3)], "600 / 448 in thirds, rounded up"
    assert model[0].dequantized_weight(FP32)[0, 2].item() == pytest.approx(-448 * 5 / 3), "the largest saturates"


@pytest.mark.parametrize(
    "granularity, shape", [(PerBlock(128, 128), (2, 2)), (PerGroup(128), (192, 2)), (PerGroup(32), (192, 7))], ids=str
)
def test_a_method_by_blocks_or_groups_goes_through_a_model(granularity, shape):
    weight = ScaleRule(granularity, "maxabs", "pow2", 1.0)
    register_method(ScaleMethod("In_Parts", weight, SCALE_METHODS["maxabs_hw"].activation))
    model, x = nn.Sequential(nn.Linear(200, 192)), torch.randn(5, 200)
    expected, original = model(x), model[0].weight.detach().clone()
    convert(model, FP8Config(scale_method="in_parts", activation_scheme="dynamic"))
    assert model[0].weight_scale.shape == shape and str(granularity) in repr(model)
    assert torch.allclose(model[0].dequantized_weight(FP32), original, rtol=2**-4, atol=1e-4)
    assert ((model(x) - expected).norm() / expected.norm()).item() < 0.05
    other = convert(nn.Sequential(nn.Linear(200, 192)), FP8Config(scale_method="in_parts", activation_scheme="dynamic"))
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x), model(x))


def test_registering_again_replaces():
    before = VALUES["unit"]
    register_value("unit", SecondLargest())
    assert VALUES["unit"] is not before and len([name for name in VALUES if name == "unit"]) == 1


@pytest.mark.parametrize(
    "rule, message",
    [
        (
            ScaleRule(PerTensor(), "maxab", "pow2"),
            "the value rule 'maxab' of a scale is unknown: did you mean 'maxabs'",
        ),
        (ScaleRule(PerTensor(), "maxabs", "pow"), "rounding='pow' is unknown: did you mean 'pow2'"),
    ],
    ids=["value", "rounding"],
)
@pytest.mark.parametrize("dtype", [FP32, torch.bfloat16])
def test_unknown_names_are_refused_with_the_nearest(rule, message, dtype):
    with pytest.raises(FP8ConfigError, match=message):
        quantize_weight(torch.ones(2, 2, dtype=dtype), rule, number_format(), FP32)
