"""Convolutions on an emulated Gaudi equal the reference's to the bit: the scales are multiplied in its order."""

from __future__ import annotations

import pytest
import torch
from grids import over

from optimum_fp8 import ops
from optimum_fp8.errors import FP8NotAvailableError
from optimum_fp8.formats import number_format
from optimum_fp8.test_utils import gaudi

CHIPS = {"chip": ["gaudi2", "gaudi3"], "bridge": ["1.19", "1.24"]}
PLAIN = {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1)}
ONE, CHANNELS = (1,), (8, 1, 1, 1)


def operands(fmt, shape=(2, 6, 9, 7), kernel=(3, 3), groups=1, scale=ONE, dtype=torch.bfloat16):
    weight = ops.cast_to_fp8(torch.randn(8, shape[-1 - len(kernel)] // groups, *kernel), torch.full((1,), 0.01), *fmt)
    return (torch.randn(shape) * 3).to(dtype), weight, torch.rand(scale) * 0.01 + 1e-4, torch.tensor([0.03])


def both(x, weight, weight_scale, input_scale, bias, chip="gaudi2", bridge="1.24", fmt=None, **options):
    """The result on the emulator, that of the ordinary path, and what was called."""
    options = {**PLAIN, "full_scale": (fmt or number_format("E4M3", chip)).full_scale, "arithmetic": "gaudi"} | options
    arguments = (x, weight, weight_scale, input_scale, bias)
    expected = ops.conv(*arguments, **options)
    with gaudi.emulated(chip, bridge=bridge) as device, ops.backend("hpu"):
        found = ops.conv(*arguments, **options)
    return found, expected, device.calls


@over(
    **CHIPS,
    fp8=["E4M3", "E5M2"],
    scale=[ONE, CHANNELS],
    arithmetic=["gaudi", "fused"],
    dtype=[torch.bfloat16, torch.float32],
)
def test_value(chip, bridge, fp8, scale, arithmetic, dtype):
    fmt = number_format(fp8, chip)
    tensors = operands((fmt.dtype, fmt.full_scale), scale=scale, dtype=dtype)
    for bias in (None, torch.randn(8).to(dtype)):
        found, expected, calls = both(*tensors, bias, chip, bridge, fmt, arithmetic=arithmetic)
        assert torch.equal(found, expected) and found.dtype == dtype
        assert [call.name for call in calls] == ["cast_to_fp8_v2", "conv2d_fp8"]
        assert calls[1].arguments["bias"] is None
        given = [calls[1].scales[name][0].values[0] for name in ("scale_input", "scale_weight")]
        if scale == ONE and arithmetic == "gaudi":
            assert given == [tensors[3].item(), tensors[2].item()] and calls[1].overload == "default"
            assert calls[1].arguments["out_dtype"] == dtype
        else:
            assert given == [1.0, 1.0] and calls[1].overload == "scalar"
            assert calls[1].arguments["out_dtype"] == torch.float32


@pytest.mark.parametrize(
    "geometry, kernel",
    [
        ({"stride": (2, 1), "padding": (1, 0)}, (3, 2)),
        ({"dilation": (2, 1), "padding": (2, 3)}, (3, 3)),
        ({"groups": 2}, (3, 3)),
        ({"groups": 3, "stride": (3, 2)}, (1, 1)),
    ],
)
def test_geometry(geometry, kernel):
    fmt = number_format("E4M3", "gaudi2")
    for scale in (ONE, CHANNELS):
        groups = geometry.get("groups", 1)
        made = operands((fmt.dtype, fmt.full_scale), (2, 6, 9, 7), kernel, groups, scale)
        made = made if groups != 3 else (made[0], made[1][:6].contiguous(), made[2][:6], made[3])
        found, expected, _ = both(*made, None, **geometry)
        assert torch.equal(found, expected)
    unbatched, expected, _ = both(made[0][0], *made[1:], None, **geometry)
    assert torch.equal(unbatched, expected)


def test_one_dimension():
    fmt = number_format("E4M3", "gaudi3")
    geometry = {"stride": (2,), "padding": (1,), "dilation": (2,)}
    for scale, shape in ((ONE, (2, 6, 20)), ((8, 1, 1), (2, 6, 20)), ((8, 1, 1), (6, 20))):
        made = operands((fmt.dtype, fmt.full_scale), shape, (3,), scale=scale)
        found, expected, calls = both(*made, torch.randn(8).bfloat16(), "gaudi3", **geometry)
        assert torch.equal(found, expected)
    assert calls[1].arguments["stride"] == calls[1].arguments["dilation"] == [1, 2]
    assert calls[1].arguments["padding"] == [0, 1]


def test_known_constants_are_passed_as_numbers():
    fmt = number_format("E4M3", "gaudi2")
    x, weight, _, _ = operands((fmt.dtype, fmt.full_scale))
    scales = torch.full((1,), 2.0**-4), torch.full((1,), 16.0)
    for scale in scales:
        assert ops.mark_constant(scale, fmt.hardware_scales)
    found, expected, calls = both(x, weight, *scales, None)
    assert torch.equal(found, expected)
    assert [call.overload for call in calls] == ["scalar", "scalar"] and all(call.free_scales for call in calls)
    assert (calls[1].scales["scale_input"][0].values, calls[1].scales["scale_weight"][0].values) == ((16.0,), (2**-4,))


def test_scales_of_channels_are_folded_out():
    fmt = number_format("E4M3", "gaudi2")
    _, _, calls = both(*operands((fmt.dtype, fmt.full_scale), scale=CHANNELS), None)
    assert calls[1].free_scales and calls[1].arguments["out_dtype"] == torch.float32


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"input_scale": None}, "multiplies FP8 with FP8"),
        ({"arithmetic": "qdq"}, "arithmetic 'qdq'"),
        ({"transposed": True, "x": torch.randn(2, 8, 5, 5).bfloat16()}, "transposed"),
        ({"x": torch.randn(2, 6, 9, 7).half()}, "float16"),
        ({"bias": torch.randn(3)}, "a bias of shape"),
        ({"full_scale": 448.0}, "reads those above 240 as Inf"),
    ],
)
def test_what_the_operator_does_not_take_is_refused(change, reason):
    fmt = number_format("E4M3", "gaudi2")
    x, weight, weight_scale, input_scale = operands((fmt.dtype, fmt.full_scale))
    given = {"x": x, "weight": weight, "weight_scale": weight_scale, "input_scale": input_scale, "bias": None} | change
    given = {**PLAIN, "full_scale": fmt.full_scale, "arithmetic": "gaudi"} | given
    with gaudi.emulated("gaudi2"), ops.backend("hpu"), pytest.raises(FP8NotAvailableError, match=reason):
        ops.conv(**given)


def test_three_dimensions_are_refused():
    fmt = number_format("E4M3", "gaudi2")
    made, three = operands((fmt.dtype, fmt.full_scale), (2, 6, 5, 5, 5), (3, 3, 3)), (1,) * 3
    with pytest.raises(FP8NotAvailableError, match="3 spatial dimensions: conv2d_fp8 has two"):
        both(*made, None, stride=three, padding=three, dilation=three)
