"""`ops.conv` against a convolution written as matrix products in float64."""

import ml_dtypes
import numpy as np
import pytest
import torch
from grids import over

from optimum_fp8 import ops
from optimum_fp8.errors import FP8ConfigError, FP8OperandError, FP8ScaleError

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
HIGH = {torch.bfloat16: ml_dtypes.bfloat16, torch.float16: np.float16, torch.float32: np.float32}
FP8 = {E4M3: ml_dtypes.float8_e4m3fn, E5M2: ml_dtypes.float8_e5m2}
PLAIN = {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1), "groups": 1}


def as_numpy(tensor):
    return tensor.float().numpy().astype(np.float64)


def rounded(value, dtype):
    return value.astype(HIGH[dtype]).astype(np.float64)


def codes_of(x, scale, dtype, full_scale):
    scaled = x.float().numpy() * (np.float32(1) / scale.numpy())
    return scaled.clip(-full_scale, full_scale).astype(FP8[dtype]).astype(np.float64)


def reach(offset, dilation, stride, count):
    """Positions that one place of the kernel touches, for `count` windows, in each dimension."""
    steps = zip(offset, dilation, stride, count, strict=True)
    return tuple(slice(i * d, i * d + s * (n - 1) + 1, s) for i, d, s, n in steps)


def convolved(x, weight, stride, padding, dilation, groups, transposed=False, output_padding=None):
    """Convolution of [N, C, …], one place of the kernel at a time; transposed, each input is spread instead.

    The weight of a transposed one is as torch stores it, `[C, out / groups, …]`.
    """
    kernel, dims = weight.shape[2:], len(stride)
    extent = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    per_group = np.split(weight, groups, axis=0)
    if transposed:
        count = x.shape[2:]
        more = output_padding or (0,) * dims
        size = [(n - 1) * s + e for n, s, e in zip(count, stride, extent, strict=True)]
        room = [max(n + m, n) for n, m in zip(size, more, strict=True)]
        result = np.zeros((x.shape[0], groups * weight.shape[1], *room))
        for group, (ins, kernels) in enumerate(zip(np.split(x, groups, axis=1), per_group, strict=True)):
            outs = slice(group * weight.shape[1], (group + 1) * weight.shape[1])
            for place in np.ndindex(*kernel):
                part = np.einsum("nc...,co->no...", ins, kernels[(..., *place)])
                result[(slice(None), outs, *reach(place, dilation, stride, count))] += part
        cut = [slice(p, n - p) for p, n in zip(padding, room, strict=True)]
        return result[(slice(None), slice(None), *cut)]
    x = np.pad(x, ((0, 0), (0, 0), *((p, p) for p in padding)))
    count = [(n - e) // s + 1 for n, e, s in zip(x.shape[2:], extent, stride, strict=True)]
    found = []
    for ins, kernels in zip(np.split(x, groups, axis=1), per_group, strict=True):
        places = [(ins[(..., *reach(at, dilation, stride, count))], kernels[(..., *at)]) for at in np.ndindex(*kernel)]
        found.append(sum(np.einsum("nc...,oc->no...", patch, kernel) for patch, kernel in places))
    return np.concatenate(found, axis=1)


def as_torch_stores(weight, groups):
    """`[C, out / groups, …]` of a weight `[out, C / groups, …]`, group by group."""
    return np.concatenate([part.swapaxes(0, 1) for part in np.split(weight, groups, axis=0)], axis=0)


def by_hand(x, weight, weight_scale, input_scale, bias, geometry, full_scale, arithmetic):
    """The result, and a bound of its error, as for the linear operator."""
    unbatched, dtype = x.ndim < weight.ndim, x.dtype
    x = x[None] if unbatched else x
    a = as_numpy(x)
    if input_scale is not None:
        a = codes_of(x, input_scale, weight.dtype, full_scale) * input_scale.numpy()
    b = as_numpy(weight) * as_numpy(weight_scale)
    if geometry.get("transposed"):
        b = as_torch_stores(b, geometry["groups"])
    if arithmetic == "qdq":
        a, b = rounded(a.astype(np.float32), dtype), rounded(b.astype(np.float32), dtype)
    product = convolved(a, b, **geometry)
    ulp, terms = torch.finfo(dtype).eps, weight.numel() // min(weight.shape[:2]) + 4
    magnitude = convolved(np.abs(a), np.abs(b), **geometry)
    bound = magnitude * terms * 2.0**-24
    if arithmetic == "qdq" and geometry.get("transposed"):  # torch sums up places of the kernel in the dtype
        bound += magnitude * ulp
    if arithmetic == "gaudi":
        bound += np.abs(product) * ulp
    result = product if bias is None else product + as_numpy(bias).reshape(-1, *[1] * (weight.ndim - 2))
    bound += np.abs(result) * ulp + torch.finfo(dtype).smallest_normal * ulp
    return (result[0], bound[0]) if unbatched else (result, bound)


def operands(dtype=torch.bfloat16, shape=(2, 6, 9, 7), out=8, kernel=(3, 3), groups=1, per_channel=True, scale=0.03):
    x = torch.randn(shape).to(dtype)
    weight = (torch.randn(out, shape[-3] // groups, *kernel) * 20).to(E4M3)
    weight_scale = torch.rand((out, 1, 1, 1) if per_channel else (1,)) * 0.01 + 1e-4
    return x, weight, weight_scale, None if scale is None else torch.tensor([scale]), torch.randn(out).to(dtype)


def assert_close(operands, geometry, arithmetic="fused", full_scale=448.0):
    result = ops.conv(*operands, **geometry, full_scale=full_scale, arithmetic=arithmetic)
    expected, bound = by_hand(*operands, geometry, full_scale, arithmetic)
    assert result.dtype == operands[0].dtype and result.shape == expected.shape
    assert (np.abs(as_numpy(result) - expected) - bound).max() <= 0


@pytest.mark.core
@over(dtype=HIGH, arithmetic=ops.ARITHMETICS, scale=[None, 0.03], per_channel=[True, False])
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
@over(arithmetic=ops.ARITHMETICS)
def test_geometry(geometry, kernel, arithmetic):
    groups = geometry.get("groups", 1)
    assert_close(operands(kernel=kernel, groups=groups, out=6 * 2), PLAIN | geometry, arithmetic)


@over(arithmetic=ops.ARITHMETICS, shape=[(6, 9, 7), (1, 6, 3, 3)])
def test_unbatched_and_smallest(arithmetic, shape):
    assert_close(operands(shape=shape), PLAIN, arithmetic)


def test_empty_batch():
    result = ops.conv(*operands(shape=(0, 6, 9, 7)), **PLAIN, full_scale=448.0)
    assert result.shape == (0, 8, 7, 5) and result.dtype == torch.bfloat16


def test_without_bias_and_channels_last():
    *data, _ = operands()
    assert_close((*data, None), PLAIN)
    data[0] = data[0].to(memory_format=torch.channels_last)
    assert_close((*data, None), PLAIN)


@over(arithmetic=ops.ARITHMETICS)
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
        result = ops.conv(x, weight, scale, torch.ones(1), bias, **PLAIN, full_scale=448.0, arithmetic=arithmetic)
        assert np.array_equal(as_numpy(result), expected)


@over(arithmetic=ops.ARITHMETICS)
def test_autocast_changes_nothing(arithmetic):
    data = operands(torch.float32)
    expected = ops.conv(*data, **PLAIN, full_scale=448.0, arithmetic=arithmetic)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = ops.conv(*data, **PLAIN, full_scale=448.0, arithmetic=arithmetic)
    assert result.dtype == torch.float32 and torch.equal(result, expected)


def test_pointwise_convolution_is_a_linear():
    x, weight, weight_scale, input_scale, bias = operands(torch.float32, kernel=(1, 1))
    result = ops.conv(x, weight, weight_scale, input_scale, bias, **PLAIN, full_scale=448.0)
    flat = (x.movedim(1, -1), weight.flatten(1), weight_scale.flatten(1), input_scale, bias)
    expected = ops.linear(*flat, full_scale=448.0).movedim(-1, 1)
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)


def whole(dims, transposed=False, stride=1, padding=0, dilation=1, groups=1, output_padding=0):
    """A geometry that is the same in all dimensions."""
    each = {"stride": stride, "padding": padding, "dilation": dilation, "output_padding": output_padding}
    return {name: (value,) * dims for name, value in each.items()} | {"groups": groups, "transposed": transposed}


GEOMETRIES = [
    whole(1, padding=2, stride=2),
    whole(1, groups=3, dilation=2),
    whole(3, stride=2, padding=1),
    whole(3, groups=2, padding=1),
    whole(1, True, stride=2, padding=1, output_padding=1),
    whole(1, True, groups=2, dilation=2),
    whole(2, True),
    whole(2, True, stride=3, padding=1, output_padding=2, groups=3),
    whole(2, True, dilation=2, stride=2, padding=2),
    whole(3, True, stride=2, padding=1, output_padding=1),
]


def laid_out(geometry, dtype=torch.bfloat16, fp8=E4M3, per_channel=True, scale=0.03, unbatched=False, bias=True):
    """Operands for 6 channels in and 12 out, on images of 5, 6, … positions."""
    dims = len(geometry["stride"])
    weight = (torch.randn(12, 6 // geometry["groups"], *[3] * dims) * 20).to(fp8)
    weight_scale = torch.rand((12, 1, *[1] * dims) if per_channel else (1,)) * 0.01 + 1e-4
    x = torch.randn(*(() if unbatched else (2,)), 6, *range(7, 7 + dims)).to(dtype)
    return (
        x,
        weight,
        weight_scale,
        None if scale is None else torch.tensor([scale]),
        (torch.randn(12).to(dtype) if bias else None),
    )


@over(backend=[ops.cpu.backends()[0], "reference"], geometry=GEOMETRIES, arithmetic=ops.ARITHMETICS)
def test_one_to_three_dimensions_and_transposed(backend, geometry, arithmetic):
    with ops.backend(backend):
        assert_close(laid_out(geometry), geometry, arithmetic)
        assert_close(laid_out(geometry, torch.float32, per_channel=False, scale=None), geometry, arithmetic)
        assert_close(laid_out(geometry, torch.float16, unbatched=True, bias=False), geometry, arithmetic)
        assert_close(laid_out(geometry, fp8=E5M2), geometry, arithmetic, 57344.0)


@over(geometry=GEOMETRIES)
def test_it_is_torchs_convolution_of_the_dequantized_weight(geometry):
    """The layout of groups is torch's own, and that of weights, but for output channels that lead."""
    x, weight, scale, _, bias = laid_out(geometry, torch.float32, scale=None)
    kind = torch.nn.functional
    dims, options = len(geometry["stride"]), dict(geometry)
    transposed, output_padding = options.pop("transposed"), options.pop("output_padding")
    options |= {"output_padding": output_padding} if transposed else {}
    function = getattr(kind, f"conv_transpose{dims}d" if transposed else f"conv{dims}d")
    values = (weight.float() * scale).numpy()
    values = as_torch_stores(values, geometry["groups"]) if transposed else values
    expected = function(x, torch.from_numpy(values), bias, **options)
    torch.testing.assert_close(ops.conv(x, weight, scale, None, bias, **geometry, full_scale=448.0), expected)


def test_padding_of_the_output_is_zero_unless_asked_for():
    geometry = whole(2, True, stride=2)
    expected = ops.conv(*laid_out(geometry), **geometry, full_scale=448.0)
    torch.manual_seed(0)
    del geometry["output_padding"]
    found = ops.conv(*laid_out(geometry), **geometry, full_scale=448.0)
    assert found.shape == expected.shape


def test_operands_that_do_not_fit_are_refused():
    x, weight, scale, input_scale, bias = operands()
    options = {**PLAIN, "full_scale": 448.0}
    for bad in (x[:, :5], x[0, 0], x[None], x[0, :4]):
        message = r"conv: an input of shape .* expected \(N, C, …\) or \(C, …\) with 6"
        with pytest.raises(FP8OperandError, match=message):
            ops.conv(bad, weight, scale, input_scale, bias, **options)
    with pytest.raises(FP8OperandError, match=r"a bias of shape \(6,\).*expected \(8,\)"):
        ops.conv(x, weight, scale, input_scale, torch.ones(6), **options)
    with pytest.raises(FP8OperandError, match="a weight in torch.uint8.*view"):
        ops.conv(x, weight.view(torch.uint8), scale, input_scale, bias, **options)
    for bad in (torch.ones(8), torch.ones(1, 8, 1, 1), torch.ones(6, 1, 1, 1)):
        with pytest.raises(FP8ScaleError, match=r"conv: a scale of shape .*expected \(1,\) or \(8, 1, 1, 1\)"):
            ops.conv(x, weight, bad, input_scale, bias, **options)
    with pytest.raises(FP8ScaleError, match=r"conv: an input scale of shape \(2, 1, 1, 1\): expected \(1,\)"):
        ops.conv(x, weight, scale, torch.ones(2, 1, 1, 1), bias, **options)
    with pytest.raises(FP8ConfigError, match="full_scale=57344.0.*448"):
        ops.conv(x, weight, scale, input_scale, bias, **{**options, "full_scale": 57344.0})


def test_scales_of_transposed_weights_are_those_of_their_outputs():
    geometry = whole(2, True, groups=3)
    x, weight, scale, *rest = laid_out(geometry)
    with pytest.raises(FP8ScaleError, match=r"expected \(1,\) or \(12, 1, 1, 1\)"):
        ops.conv(x, weight, scale[:4].reshape(1, 4, 1, 1), *rest, **geometry, full_scale=448.0)
