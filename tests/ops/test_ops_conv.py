"""`ops.conv2d` against a convolution written as matrix products in float64."""

import ml_dtypes
import numpy as np
import pytest
import torch

from optimum_fp8 import ops

E4M3 = torch.float8_e4m3fn
HIGH = {torch.bfloat16: ml_dtypes.bfloat16, torch.float16: np.float16, torch.float32: np.float32}
PLAIN = {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1), "groups": 1}


def as_numpy(tensor):
    return tensor.float().numpy().astype(np.float64)


def rounded(value, dtype):
    return value.astype(HIGH[dtype]).astype(np.float64)


def codes_of(x, scale, full_scale):
    scaled = x.float().numpy() * (np.float32(1) / scale.numpy())
    return scaled.clip(-full_scale, full_scale).astype(ml_dtypes.float8_e4m3fn).astype(np.float64)


def convolved(x, weight, stride, padding, dilation, groups):
    """Convolution of [N, C, H, W], one kernel position at a time."""
    x = np.pad(x, ((0, 0), (0, 0), (padding[0],) * 2, (padding[1],) * 2))
    height, width = ((x.shape[2 + i] - dilation[i] * (weight.shape[2 + i] - 1) - 1) // stride[i] + 1 for i in range(2))
    result = np.zeros((x.shape[0], weight.shape[0], height, width))
    outs, ins = weight.shape[0] // groups, weight.shape[1]
    for group in range(groups):
        for i, j in np.ndindex(*weight.shape[2:]):
            rows, columns = i * dilation[0], j * dilation[1]
            patch = x[:, group * ins : (group + 1) * ins, rows:, columns:][..., :: stride[0], :: stride[1]]
            patch = patch[..., :height, :width]
            kernel = weight[group * outs : (group + 1) * outs, :, i, j]
            result[:, group * outs : (group + 1) * outs] += np.einsum("nchw,oc->nohw", patch, kernel)
    return result


def by_hand(x, weight, weight_scale, input_scale, bias, geometry, full_scale, arithmetic):
    """The result, and a bound of its error, as for the linear operator."""
    unbatched, dtype = x.ndim == 3, x.dtype
    x = x[None] if unbatched else x
    a = as_numpy(x) if input_scale is None else codes_of(x, input_scale, full_scale) * input_scale.numpy()
    b = as_numpy(weight) * as_numpy(weight_scale)
    if arithmetic == "qdq":
        a, b = rounded(a.astype(np.float32), dtype), rounded(b.astype(np.float32), dtype)
    product = convolved(a, b, **geometry)
    ulp, terms = torch.finfo(dtype).eps, weight[0].numel() + 4
    bound = convolved(np.abs(a), np.abs(b), **geometry) * terms * 2.0**-24
    if arithmetic == "gaudi":
        bound += np.abs(product) * ulp
    result = product if bias is None else product + as_numpy(bias)[:, None, None]
    bound += np.abs(result) * ulp + torch.finfo(dtype).smallest_normal * ulp
    return (result[0], bound[0]) if unbatched else (result, bound)


def operands(dtype=torch.bfloat16, shape=(2, 6, 9, 7), out=8, kernel=(3, 3), groups=1, per_channel=True, scale=0.03):
    x = torch.randn(shape).to(dtype)
    weight = (torch.randn(out, shape[-3] // groups, *kernel) * 20).to(E4M3)
    weight_scale = torch.rand((out, 1, 1, 1) if per_channel else (1,)) * 0.01 + 1e-4
    return x, weight, weight_scale, None if scale is None else torch.tensor([scale]), torch.randn(out).to(dtype)


def assert_close(operands, geometry, arithmetic="fused", full_scale=448.0):
    result = ops.conv2d(*operands, **geometry, full_scale=full_scale, arithmetic=arithmetic)
    expected, bound = by_hand(*operands, geometry, full_scale, arithmetic)
    assert result.dtype == operands[0].dtype and result.shape == expected.shape
    assert (np.abs(as_numpy(result) - expected) - bound).max() <= 0


@pytest.mark.core
@pytest.mark.parametrize("dtype", HIGH)
@pytest.mark.parametrize("arithmetic", ops.ARITHMETICS)
@pytest.mark.parametrize("scale", [None, 0.03])
@pytest.mark.parametrize("per_channel", [True, False])
def test_value(dtype, arithmetic, scale, per_channel):
    assert_close(operands(dtype, scale=scale, per_channel=per_channel), PLAIN, arithmetic)


@pytest.mark.parametrize(
    "geometry, kernel",
    [
        ({"stride": (2, 2)}, (3, 3)),
        ({"stride": (2, 1), "padding": (1, 0)}, (3, 2)),
        ({"padding": (2, 1)}, (5, 3)),
        ({"dilation": (2, 1)}, (3, 3)),
        ({"dilation": (2, 2), "padding": (2, 2), "stride": (3, 2)}, (3, 3)),
        ({"groups": 2}, (3, 3)),
        ({"groups": 3, "padding": (1, 1)}, (1, 1)),
        ({"groups": 6, "stride": (2, 2)}, (2, 2)),
        ({"stride": (3, 7)}, (3, 7)),
    ],
)
@pytest.mark.parametrize("arithmetic", ops.ARITHMETICS)
def test_geometry(geometry, kernel, arithmetic):
    groups = geometry.get("groups", 1)
    assert_close(operands(kernel=kernel, groups=groups, out=6 * 2), PLAIN | geometry, arithmetic)


@pytest.mark.parametrize("arithmetic", ops.ARITHMETICS)
@pytest.mark.parametrize("shape", [(6, 9, 7), (1, 6, 3, 3)])
def test_unbatched_and_smallest(arithmetic, shape):
    assert_close(operands(shape=shape), PLAIN, arithmetic)


def test_empty_batch():
    result = ops.conv2d(*operands(shape=(0, 6, 9, 7)), **PLAIN, full_scale=448.0)
    assert result.shape == (0, 8, 7, 5) and result.dtype == torch.bfloat16


def test_without_bias_and_channels_last():
    *data, _ = operands()
    assert_close((*data, None), PLAIN)
    data[0] = data[0].to(memory_format=torch.channels_last)
    assert_close((*data, None), PLAIN)


@pytest.mark.parametrize("arithmetic", ops.ARITHMETICS)
def test_saturates_at_the_full_scale(arithmetic):
    assert_close(operands(scale=1 / 240), PLAIN, arithmetic, full_scale=240.0)


@pytest.mark.core
def test_where_it_rounds():
    """On small integers every sum is exact, so results are equal to the last bit."""
    x = torch.randint(-8, 9, (2, 4, 8, 8)).bfloat16()
    weight = torch.randint(-8, 9, (6, 4, 3, 3)).float().to(E4M3)
    scale = 2.0 ** torch.arange(-3.0, 3.0).reshape(6, 1, 1, 1)
    bias = (torch.randint(-999, 1000, (6,)) / 64).bfloat16()
    product = convolved(as_numpy(x), as_numpy(weight) * as_numpy(scale), **PLAIN)
    offset = as_numpy(bias)[:, None, None]
    once = rounded(product + offset, torch.bfloat16)
    twice = rounded(rounded(product, torch.bfloat16) + offset, torch.bfloat16)
    assert not np.array_equal(once, twice)
    for arithmetic, expected in (("fused", once), ("gaudi", twice)):
        result = ops.conv2d(x, weight, scale, torch.ones(1), bias, **PLAIN, full_scale=448.0, arithmetic=arithmetic)
        assert np.array_equal(as_numpy(result), expected)


@pytest.mark.parametrize("arithmetic", ops.ARITHMETICS)
def test_autocast_changes_nothing(arithmetic):
    data = operands(torch.float32)
    expected = ops.conv2d(*data, **PLAIN, full_scale=448.0, arithmetic=arithmetic)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = ops.conv2d(*data, **PLAIN, full_scale=448.0, arithmetic=arithmetic)
    assert result.dtype == torch.float32 and torch.equal(result, expected)


def test_pointwise_convolution_is_a_linear():
    x, weight, weight_scale, input_scale, bias = operands(torch.float32, kernel=(1, 1))
    result = ops.conv2d(x, weight, weight_scale, input_scale, bias, **PLAIN, full_scale=448.0)
    flat = (x.movedim(1, -1), weight.flatten(1), weight_scale.flatten(1), input_scale, bias)
    expected = ops.linear(*flat, full_scale=448.0).movedim(-1, 1)
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)
