"""Casts on an emulated Gaudi are those of the reference, in codes and in bits."""

from __future__ import annotations

import pytest
import torch
from grids import over
from on_gaudi import constant

from optimum_fp8 import ops
from optimum_fp8.errors import FP8NotAvailableError
from optimum_fp8.formats import number_format
from optimum_fp8.test_utils import gaudi

CHIPS = ("gaudi2", "gaudi3")
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
E4M3 = torch.float8_e4m3fn


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("fp8_config", ["E4M3", "E5M2"])
@pytest.mark.parametrize("shape", [(1,), (16, 1), None], ids=["tensor", "rows", "constant"])
@over(dtype=[BF16, FP16, FP32])
def test_there_and_back(chip, fp8_config, shape, dtype):
    fmt = number_format(fp8_config, chip)
    x = (torch.randn(16, 64) * 300).to(dtype)
    scale = constant(torch.tensor([16.0])) if shape is None else torch.rand(shape) + 0.5
    with ops.backend("reference"):
        expected = ops.cast_to_fp8(x, scale, fmt.dtype, fmt.full_scale)
        back = ops.cast_from_fp8(expected, scale, dtype)
    with gaudi.emulated(chip) as device, ops.backend("hpu"):
        codes = ops.cast_to_fp8(x, scale, fmt.dtype, fmt.full_scale)
        assert torch.equal(codes.view(torch.uint8), expected.view(torch.uint8))
        assert torch.equal(ops.cast_from_fp8(codes, scale, dtype), back)
    overload = "scalar" if shape is None else "default"
    assert [(call.name, call.overload) for call in device.calls] == [
        ("cast_to_fp8_v2", overload),
        ("cast_from_fp8", overload),
    ]
    given = device.calls[0].arguments
    assert given["stochastic_rounding"] is False and given["is_amax"] is False
    assert device.calls[1].arguments["out_dtype"] == (FP32 if dtype == FP16 else dtype)


def test_known_constants_are_passed_as_numbers():
    fmt, scale = number_format("E4M3", "gaudi2"), torch.full((1,), 2.0**-4)
    assert ops.mark_constant(scale, fmt.hardware_scales)
    with gaudi.emulated("gaudi2") as device, ops.backend("hpu"):
        codes = ops.cast_to_fp8(torch.ones(4, dtype=torch.bfloat16), scale, fmt.dtype, fmt.full_scale)
        back = ops.cast_from_fp8(codes, scale, torch.float32)
        scale.fill_(0.5)  # no longer what it was
        ops.cast_from_fp8(codes, scale, torch.float32)
    assert back.tolist() == [1.0] * 4 and codes.float().tolist() == [16.0] * 4
    assert [call.overload for call in device.calls] == ["scalar", "scalar", "default"]
    assert [call.free_scales for call in device.calls] == [True, True, False]


@pytest.mark.parametrize(
    "chip, x, scale, full_scale, text",
    [
        ("gaudi3", torch.ones(4), torch.ones(1), 100.0, "that saturate at 100.0"),
        ("gaudi3", torch.ones(4).to(E4M3), torch.ones(1), 240.0, "casts of torch.float8_e4m3fn to .* at 240.0"),
        ("gaudi3", torch.ones(4).double(), torch.ones(1), 448.0, "a cast of torch.float64"),
        ("gaudi3", torch.ones(4), torch.ones(3), 448.0, r"scales of \(3,\) for \(4,\)"),
        ("gaudi2", torch.ones(4), torch.ones(1), 448.0, "reads those above 240 as Inf"),
    ],
    ids=["other full scale", "codes", "dtype", "scales", "larger full scale"],
)
def test_codes_that_the_card_cannot_make_are_refused(chip, x, scale, full_scale, text):
    with gaudi.emulated(chip), ops.backend("hpu"), pytest.raises(FP8NotAvailableError, match=text):
        ops.cast_to_fp8(x, scale, E4M3, full_scale)


@pytest.mark.parametrize(
    "count, dtype, text",
    [(1, torch.float64, "a cast to torch.float64"), (3, FP32, "scales of")],
    ids=["dtype", "scales"],
)
def test_values_that_the_card_cannot_make_are_refused(count, dtype, text):
    with gaudi.emulated("gaudi2"), ops.backend("hpu"), pytest.raises(FP8NotAvailableError, match=text):
        ops.cast_from_fp8(torch.ones(4).to(E4M3), torch.ones(count), dtype)


def test_without_a_bridge_it_cannot_be_forced():
    message = "backend 'hpu' cannot run: torch.ops.hpu has no operators"
    with pytest.raises(FP8NotAvailableError, match=message), ops.backend("hpu"):
        pass
    assert "hpu" not in ops.backends()
