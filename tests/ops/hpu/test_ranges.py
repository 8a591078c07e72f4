"""Ranges and dynamic scales on an emulated Gaudi are those of the reference, to the last bit."""

from __future__ import annotations

import pytest
import torch
from grids import over
from on_gaudi import FORMATS, both, fmt_of, same_codes

from optimum_fp8 import ops
from optimum_fp8.errors import FP8NotAvailableError
from optimum_fp8.formats import HP_DTYPES, number_format
from optimum_fp8.scales import PerTensor, PerToken, scale_method
from optimum_fp8.scales.methods import SCALE_METHODS
from optimum_fp8.test_utils import gaudi

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def ranges():
    """Tensors of all kinds of ranges: those where roundings differ, powers of two, and the ends of what there is."""
    telling = [14.0625, 7.03125, 1.7734375, 0.88671875, 28.125, 3.546875, 0.47265625, 0.0, 1e-30, 1e-40, 3e38]
    powers = [2.0**e for e in (-126, -20, -8, 0, 7, 15, 100)]
    return [
        torch.tensor([0.0, -value, value / 3, 0.0]) for value in (*telling, *powers, *(torch.rand(10) * 20).tolist())
    ]


def scale_of(x, fmt, hp_dtype, *, group=0, divisor=None, rounding="identity"):
    divisor = fmt.full_scale * 0.5 if divisor is None else divisor
    named = {"fp8_config": fmt.name, "target": fmt.target, "hp_dtype": hp_dtype}
    return lambda: ops.dynamic_scale(x, group=group, divisor=divisor, rounding=rounding, **named)


@over(rounding=["identity", "pow2", "hardware"], dtype=DTYPES, hp_dtype=HP_DTYPES.values(), group=[0, -1, 3])
def test_dynamic_scales_of_gaudis_targets(device, rounding, dtype, hp_dtype, group):
    for x in ranges():
        found, expected = both(
            scale_of(x.to(dtype).repeat(2, 1), fmt_of(device), hp_dtype, group=group, rounding=rounding)
        )
        assert torch.equal(found, expected) and found.dtype == torch.float32


@over(value=[3e38, 1e-40], rounding=["identity", "pow2"])
def test_scales_of_extreme_ranges_are_bounded(gaudi2, value, rounding):
    x = torch.tensor([0.0, value])
    found, expected = both(scale_of(x, fmt_of(gaudi2), torch.float32, divisor=1.0, rounding=rounding))
    assert torch.equal(found, expected) and not torch.equal(found, x.amax())


@over(method=list(SCALE_METHODS), fp8_config=FORMATS, granularity=[PerTensor(), PerToken()])
def test_every_method(device, method, fp8_config, granularity):
    fmt, rule = fmt_of(device, fp8_config), scale_method(method).dynamic_activation
    x = torch.randn(3, 5, 16).bfloat16() * 7
    arguments = {"group": granularity.group, "divisor": rule.divisor(fmt), "rounding": rule.rounding}
    found, expected = both(scale_of(x, fmt, torch.bfloat16, **arguments))
    assert torch.equal(found, expected)


@over(rounding=["identity", "pow2"])
def test_the_bridge_calculates_per_tensor_scales_where_it_can(gaudi2, rounding):
    fmt, x = fmt_of(gaudi2), torch.randn(4, 8).bfloat16()
    gaudi2.calls.clear()
    with ops.backend("hpu"):
        scale_of(x, fmt, torch.bfloat16, rounding=rounding)()
        assert [call.name for call in gaudi2.calls] == ["calculate_scale_for_cast"]
        scale_of(x, number_format("E4M3", "cpu"), torch.bfloat16, rounding=rounding)()  # divides, instead
        scale_of(x, fmt, torch.bfloat16, rounding=rounding, group=-1)()  # so does this
    (call,) = gaudi2.calls
    given = {name: call.arguments[name] for name in ("maxMode", "scaleMode", "fullscale", "backoff")}
    assert given == {"maxMode": 1, "scaleMode": int(rounding == "pow2"), "fullscale": 120.0, "backoff": 1.0}


def test_an_older_bridge_composes_them():
    with gaudi.emulated("gaudi2", bridge="1.19") as device:
        found, expected = both(scale_of(torch.randn(4, 8).bfloat16(), fmt_of(device), torch.bfloat16, rounding="pow2"))
    assert torch.equal(found, expected) and not device.calls


def test_values_that_are_not_finite_do_not_count(gaudi2):
    x = torch.tensor([[1.0, torch.nan], [torch.inf, -3.0]]).bfloat16()
    for rounding in ("identity", "pow2", "hardware"):
        found, expected = both(scale_of(x, fmt_of(gaudi2), torch.bfloat16, rounding=rounding))
        assert torch.equal(found, expected) and float(found) > 0
        nothing = both(scale_of(x[:0], fmt_of(gaudi2), torch.bfloat16, rounding=rounding))
        assert torch.equal(*nothing)


@over(per_row=[True, False], shape=[(4, 8), (3, 2, 4)], dtype=DTYPES)
def test_casts_by_range(device, per_row, shape, dtype):
    fmt, scales = fmt_of(device), torch.rand(1 << 15) * 0.01 + 1e-3
    for x in (torch.randn(shape).to(dtype), torch.randn(shape).to(dtype).transpose(0, 1)):
        call = {"per_row": per_row, "dtype": fmt.dtype, "full_scale": fmt.full_scale}
        (codes, scale, found), expected = both(lambda x=x, call=call: ops.cast_to_fp8_by_range(x, scales, **call))
        assert same_codes(codes, expected[0]) and codes.is_contiguous()
        assert torch.equal(scale, expected[1]) and torch.equal(found, expected[2])


@pytest.mark.parametrize("group", [0, -1, 3])
def test_maxabs_and_histogram(gaudi2, group):
    x = torch.randn(4, 8)
    assert torch.equal(*both(lambda: ops.maxabs(x, group=group)))
    assert all(map(torch.equal, *both(lambda: ops.histogram(x))))


def test_casts_by_range_to_codes_that_the_card_reads_as_inf_are_an_error(gaudi2):
    with ops.backend("hpu"), pytest.raises(FP8NotAvailableError, match="reads those above 240 as Inf"):
        ops.cast_to_fp8_by_range(
            torch.randn(4, 8), torch.ones(1 << 15), per_row=False, dtype=torch.float8_e4m3fn, full_scale=448.0
        )
