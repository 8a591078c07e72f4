"""Casts on an emulated Gaudi are those of the reference, in codes and in bits."""

from __future__ import annotations

import pytest
import torch

from optimum_fp8 import ops
from optimum_fp8.errors import FP8NotAvailableError
from optimum_fp8.formats import number_format
from optimum_fp8.test_utils import gaudi

CHIPS = ("gaudi2", "gaudi3")


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("fp8_config", ["E4M3", "E5M2"])
@pytest.mark.parametrize("shape", [(1,), (16, 1)], ids=["tensor", "rows"])
def test_there_and_back(chip, fp8_config, shape):
    fmt = number_format(fp8_config, chip)
    x = torch.randn(16, 64, dtype=torch.bfloat16) * 300
    scale = torch.rand(shape) + 0.5
    expected = ops.cast_to_fp8(x, scale, fmt.dtype, fmt.full_scale)
    back = ops.cast_from_fp8(expected, scale, torch.bfloat16)
    with gaudi.emulated(chip) as device, ops.backend("hpu"):
        codes = ops.cast_to_fp8(x, scale, fmt.dtype, fmt.full_scale)
        assert torch.equal(codes.view(torch.uint8), expected.view(torch.uint8))
        assert torch.equal(ops.cast_from_fp8(codes, scale, torch.bfloat16), back)
    assert [call.name for call in device.calls] == ["cast_to_fp8_v2", "cast_from_fp8"]


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


def test_without_a_bridge_it_cannot_be_forced():
    message = "backend 'hpu' cannot run: torch.ops.hpu has no operators"
    with pytest.raises(FP8NotAvailableError, match=message), ops.backend("hpu"):
        pass
    assert "hpu" not in ops.backends()
