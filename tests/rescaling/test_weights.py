"""Weights in FP8 by other schemes: values stay where the new scales allow it, and what changes is counted."""

from __future__ import annotations

import pytest
import torch

from optimum_fp8 import FP8CheckpointError, FP8Config
from optimum_fp8.modules.weight import frozen
from optimum_fp8.ops import cast_from_fp8
from optimum_fp8.rescaling.weights import Rescaled, rescaled
from optimum_fp8.scales import quantize_weight
from optimum_fp8.scales.weight import scale_shape
from optimum_fp8.selection import scheme_for


def scheme(**keys):
    return scheme_for(FP8Config(**{"target": "gaudi3", **keys}))


TENSOR, CHANNEL = scheme(scale_method="full_range"), scheme(scale_method="full_range_pcs")
POW2, BLOCK = scheme(scale_method="maxabs_pow2"), scheme(scale_method="block_128")
MX = scheme(scale_method="mxfp8", hp_dtype="fp32")


def weight(rows: int = 160, columns: int = 192) -> torch.Tensor:
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    return (x * torch.logspace(-2, 0, rows)[:, None] * 0.05).bfloat16()


def quantized(by):
    codes, scale, _ = quantize_weight(weight(), by.weight, by.fmt, by.hp_dtype)
    return codes, scale


def values(codes, scale):
    return cast_from_fp8(codes, scale, torch.float32)


@pytest.mark.parametrize(
    ("before", "after"),
    [(TENSOR, CHANNEL), (TENSOR, BLOCK), (CHANNEL, TENSOR), (POW2, MX), (POW2, CHANNEL), (BLOCK, BLOCK), (MX, MX)],
    ids=lambda each: str(each.weight),
)
def test_a_finer_scale_is_that_of_the_coarser_and_rounds_nothing(before, after):
    codes, scale = quantized(before)
    found, new = rescaled(codes, scale, after)
    assert tuple(new.shape) == scale_shape(codes.shape, after.weight) and new.dtype == torch.float32
    same = torch.equal(values(found, new), values(codes, scale))
    assert same if (before, after) != (CHANNEL, TENSOR) else not same  # a coarser one rounds


@pytest.mark.parametrize("after", [POW2, scheme(scale_method="maxabs_hw", target="gaudi2"), MX], ids=str)
def test_scales_are_those_that_the_rule_allows(after):
    codes, scale = quantized(CHANNEL if after is POW2 else TENSOR)
    found, new = rescaled(codes, scale, after)
    assert (torch.frexp(new)[0] == 0.5).all() and found.float().abs().max() <= after.fmt.full_scale
    if after.weight.rounding == "hardware":
        assert set(new.tolist()) <= set(after.fmt.hardware_scales.descending())
    error = (values(found, new) - values(codes, scale)).norm() / values(codes, scale).norm()
    assert 0 < error < 0.03


def test_coarser_scales_come_from_the_values_by_the_rule():
    codes, scale = quantized(BLOCK)
    found, new = rescaled(codes, scale, CHANNEL)
    expected, by_rule, _ = quantize_weight(values(codes, scale), CHANNEL.weight, CHANNEL.fmt, CHANNEL.hp_dtype)
    assert torch.equal(new, by_rule) and torch.equal(found.view(torch.uint8), expected.view(torch.uint8))


def test_the_other_format_is_quantized_anew():
    codes, scale = quantized(TENSOR)
    found, new = rescaled(codes, scale, scheme(scale_method="full_range", fp8_config="E5M2"))
    assert found.dtype == torch.float8_e5m2
    error = (values(found, new) - values(codes, scale)).norm() / values(codes, scale).norm()
    assert 0.02 < error < 0.08


def test_a_fixed_scale_is_the_one_that_the_method_has():
    codes, scale = quantized(TENSOR)
    _, new = rescaled(codes, scale, scheme(scale_method="unit_scale"))
    assert new.tolist() == [1.0]


def test_every_weight_is_counted_once_a_module_and_tied_ones_stay_tied():
    fit = Rescaled()
    codes, scale = map(frozen, quantized(CHANNEL))
    fit.start("a")
    first = fit(codes, scale, TENSOR)
    fit.start("b")
    second = fit(codes, scale, TENSOR)
    assert first[0] is second[0] and first[1] is second[1]
    one, two = fit.rows
    assert (one.module, two.module) == ("a", "b") and one.weights == two.weights == codes.numel()
    before, after = values(codes, scale).double(), values(*first).double()
    assert one.error == two.error == pytest.approx(((after - before).norm() / before.norm()).item(), rel=1e-5)
    assert one.rounded == int(((after - before).abs() > before.abs() * 2.0**-20).sum()) > 0
    fit.start("c")
    assert fit(codes, scale, CHANNEL)[0] is codes and fit.rows[-1].rounded == 0 == fit.rows[-1].error


def test_several_weights_of_a_module_are_one_row():
    fit = Rescaled()
    fit.start("a")
    for rows in (160, 32):
        codes, scale, _ = quantize_weight(weight(rows), CHANNEL.weight, CHANNEL.fmt, CHANNEL.hp_dtype)
        fit(frozen(codes), frozen(scale), TENSOR)
    (row,) = fit.rows
    assert row.weights == 192 * 192 and row.error > 0


def test_offloaded_codes_are_an_error():
    fit = Rescaled()
    fit.start("layer.3")
    codes, scale = quantized(TENSOR)
    with pytest.raises(FP8CheckpointError, match=r"layer\.3 is offloaded"):
        fit(frozen(codes.to("meta")), frozen(scale), CHANNEL)
