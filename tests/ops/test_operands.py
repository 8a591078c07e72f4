"""Layouts of scales, and the operators that take them, against float64 arithmetic written out value by value."""

from contextlib import nullcontext

import ml_dtypes
import numpy as np
import pytest
import torch
from grids import over

from optimum_fp8 import ops
from optimum_fp8.errors import FP8ConfigError, FP8ScaleError
from optimum_fp8.formats import number_format
from optimum_fp8.ops import operands
from optimum_fp8.rounding import scale_from_maxabs

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
FORMATS = {E4M3: (ml_dtypes.float8_e4m3fn, 448.0), E5M2: (ml_dtypes.float8_e5m2, 57344.0)}
HIGH = {torch.bfloat16: ml_dtypes.bfloat16, torch.float16: np.float16, torch.float32: np.float32}
BACKENDS = [*ops.cpu.backends(), "reference"]
# (out, in): whole blocks and groups, ragged ones, smaller than one, one value more or less
SIZES = [(128, 256), (130, 300), (256, 127), (3, 129), (5, 31), (1, 33), (257, 161), (40, 40), (1, 1)]


def expanded(scale, shape, tall, wide):
    """`scale` for each value of a matrix: one for `tall` rows and `wide` columns."""
    return scale[np.arange(shape[0]) // tall][:, np.arange(shape[1]) // wide]


def on(backend):
    """Forced, or whichever takes the call (None)."""
    return nullcontext() if backend is None else ops.backend(backend)


def scales(shape, tall, wide):
    """Random scales by blocks of `tall` x `wide`."""
    return torch.rand(-(-shape[0] // tall), -(-shape[1] // wide)) * 0.05 + 0.01


LAYOUTS = {"blocks": (128, 128), "groups of 128": (1, 128), "groups of 32": (1, 32)}


@over(shape=SIZES, layout=LAYOUTS.values(), fp8=FORMATS, dtype=HIGH)
def test_casts_by_blocks_and_groups(shape, layout, fp8, dtype):
    grid, full_scale = FORMATS[fp8]
    x, scale = (torch.randn(shape) * 8).to(dtype), scales(shape, *layout)
    wide = expanded(scale.numpy(), shape, *layout)
    expected = (x.float().numpy() * (np.float32(1) / wide)).clip(-full_scale, full_scale).astype(grid)
    values = (expected.astype(np.float32) * wide).astype(HIGH[dtype])
    for backend in ("reference", None):
        with on(backend):
            codes = ops.cast_to_fp8(x, scale, fp8, full_scale)
            assert np.array_equal(codes.view(torch.uint8).numpy(), expected.view(np.uint8)), backend
            back = ops.cast_from_fp8(codes, scale, dtype)
            assert np.array_equal(back.float().numpy(), values.astype(np.float32)), backend


@over(backend=BACKENDS, group=[128, 32], fp8=[E4M3])
def test_casts_of_more_dimensions_by_groups(backend, group, fp8):
    x = torch.randn(2, 3, 256) * 8
    scale = torch.rand(2, 3, 256 // group) * 0.05 + 0.01
    with ops.backend(backend):
        codes = ops.cast_to_fp8(x, scale, fp8, 448.0)
        flat = ops.cast_to_fp8(x.reshape(6, 256), scale.reshape(6, -1), fp8, 448.0)
        assert torch.equal(codes.reshape(6, 256).view(torch.uint8), flat.view(torch.uint8))
        transposed = x.transpose(0, 1)
        found = ops.cast_to_fp8(transposed, scale.transpose(0, 1), fp8, 448.0)
        assert torch.equal(found.view(torch.uint8), codes.transpose(0, 1).view(torch.uint8))


def test_casts_of_stacked_weights_by_blocks():
    x, scale = torch.randn(3, 130, 200) * 8, torch.rand(3, 2, 2) * 0.05 + 0.01
    codes = ops.cast_to_fp8(x, scale, E4M3, 448.0)
    for expert in range(3):
        one = ops.cast_to_fp8(x[expert], scale[expert], E4M3, 448.0)
        assert torch.equal(codes[expert].view(torch.uint8), one.view(torch.uint8))


@over(shape=SIZES, group=[32, 128, 7, 1000], dtype=HIGH)
def test_ranges_by_groups(shape, group, dtype):
    x = torch.randn(shape).to(dtype)
    x[0, -1] = torch.nan if shape[0] % 2 else 300
    values = np.abs(x.float().numpy())
    expected = np.stack([values[:, i : i + group].max(axis=1) for i in range(0, shape[1], group)], axis=1)
    fmt = number_format("E4M3", "cpu")
    for backend in ("reference", None):
        with on(backend):
            found = ops.maxabs(x, group=group)
            assert found.dtype == torch.float32 and np.array_equal(found.numpy(), expected, equal_nan=True)
            options = {"divisor": 448.0, "fp8_config": "E4M3", "target": "cpu", "hp_dtype": dtype}
            for rounding in ("identity", "pow2"):
                scale = ops.dynamic_scale(x, group=group, rounding=rounding, **options)
                finite = ops.maxabs(x.nan_to_num(nan=0.0), group=group)  # NaN is no part of the range
                wanted = scale_from_maxabs(finite.to(dtype), 448.0, rounding, fmt, dtype)
                assert torch.equal(scale, wanted)
            assert np.array_equal(ops.maxabs(x[None], group=group)[0].numpy(), expected, equal_nan=True)


@over(backend=BACKENDS)
def test_whole_groups_are_native(backend):
    x = torch.randn(4, 256).bfloat16()
    with ops.backend(backend):  # which raises where it refuses
        ranges = ops.maxabs(x, group=32)
        scale = ops.dynamic_scale(
            x, group=32, divisor=448.0, rounding="pow2", fp8_config="E4M3", target="cpu", hp_dtype=x.dtype
        )
        codes = ops.cast_to_fp8(x, scale, E4M3, 448.0)
        back = ops.cast_from_fp8(codes, scale, torch.bfloat16)
    with ops.backend("reference"):
        assert torch.equal(ranges, ops.maxabs(x, group=32))
        assert torch.equal(codes.view(torch.uint8), ops.cast_to_fp8(x, scale, E4M3, 448.0).view(torch.uint8))
        assert torch.equal(back, ops.cast_from_fp8(codes, scale, torch.bfloat16))


def test_groups_of_nothing():
    for backend in BACKENDS[:1] + BACKENDS[-1:]:
        with ops.backend(backend):
            assert ops.maxabs(torch.empty(3, 0), group=32).shape == (3, 0)
            assert torch.equal(ops.maxabs(torch.empty(0, 64), group=32), torch.empty(0, 2))
            assert torch.equal(ops.maxabs(torch.tensor(-2.0), group=32), torch.tensor([2.0]))
            assert torch.equal(ops.maxabs(torch.tensor(-2.0), group=-1), torch.tensor([2.0]))


@over(bad=[-2, -100])
def test_unknown_groups_are_refused(bad):
    for x in (torch.ones(2, 4), torch.ones(2, 4, device="meta")):
        with pytest.raises(FP8ConfigError, match=f"group={bad}: expected 0"):
            ops.maxabs(x, group=bad)


def product(x, weight, weight_layout, weight_scale, input_layout, input_scale, dtype, arithmetic, bias):
    """x Wᵀ + bias in float64 of what the codes stand for, and a bound of its error."""
    grid, full_scale = FORMATS[weight.dtype]
    a = x.float().numpy()
    if input_scale is not None:
        scale = expanded(input_scale.numpy(), a.shape, *input_layout)
        a = (a * (np.float32(1) / scale)).clip(-full_scale, full_scale).astype(grid).astype(np.float32)
        a = a.astype(np.float64) * scale
    b = weight.float().numpy().astype(np.float64) * expanded(weight_scale.numpy(), weight.shape, *weight_layout)
    if arithmetic == "qdq":
        a, b = (v.astype(np.float32).astype(HIGH[dtype]).astype(np.float64) for v in (a, b))
    exact, ulp = a @ b.T, torch.finfo(dtype).eps
    bound = np.abs(a) @ np.abs(b).T * (x.shape[1] + 8) * 2.0**-24
    result = exact + bias.double().numpy()
    bound += (np.abs(exact) * ulp if arithmetic == "gaudi" else 0) + np.abs(result) * ulp + 2.0**-60
    return result, bound


INPUTS = {"none": None, "token": (1, 1 << 30), "groups of 128": (1, 128), "groups of 32": (1, 32)}


@over(shape=SIZES, layout=LAYOUTS.values(), inputs=INPUTS.values(), fp8=FORMATS, arithmetic=ops.ARITHMETICS)
def test_linear_by_blocks_and_groups(shape, layout, inputs, fp8, arithmetic):
    out, size = shape
    dtype = list(HIGH)[(out + size) % 3]
    weight = (torch.randn(shape) * 8).to(fp8)
    weight_scale = scales(shape, *layout)
    x, bias = torch.randn(3, size).to(dtype), torch.randn(out).to(dtype)
    input_scale = None if inputs is None else scales((3, size), *inputs)
    expected, bound = product(x, weight, layout, weight_scale, inputs, input_scale, dtype, arithmetic, bias)
    options = {"full_scale": FORMATS[fp8][1], "arithmetic": arithmetic}
    for backend in ("reference", None):
        with on(backend):
            found = ops.linear(x, weight, weight_scale, input_scale, bias, **options)
            assert found.dtype == dtype and found.shape == (3, out)
            assert (np.abs(found.double().numpy() - expected) <= bound).all()
            batched = None if input_scale is None else input_scale[None]
            assert torch.equal(ops.linear(x[None], weight, weight_scale, batched, bias, **options)[0], found)


def test_a_channels_scale_with_inputs_by_groups():
    weight, x = (torch.randn(10, 160) * 8).to(E4M3), torch.randn(3, 160)
    weight_scale, input_scale, bias = torch.rand(10, 1) * 0.1, scales((3, 160), 1, 32), torch.randn(10)
    by_groups = weight_scale.expand(10, 5)
    found = ops.linear(x, weight, weight_scale, input_scale, bias, full_scale=448.0)
    expected = ops.linear(x, weight, by_groups, input_scale, bias, full_scale=448.0)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_what_a_backend_cannot_do_is_refused_with_the_reason():
    weight, x, one = torch.randn(10, 250).to(E4M3), torch.randn(3, 250), torch.ones(1)
    reason = "scales of shape {} for an input of {}"  # casts take whole groups
    for scales, shapes in (
        ((by_groups := torch.ones(10, 2), None), ((10, 2), (10, 250))),
        ((one, by_groups[:3]), ((3, 2), (3, 250))),
    ):
        record = ops.CallRecord()
        ops.linear(x, weight, *scales, None, full_scale=448.0, arithmetic="qdq", record=record)
        assert record.fallbacks == {("linear", ops.cpu.backends()[0], reason.format(*shapes)): 1}
        assert record.kernels == {("linear", "reference"): 1}


def test_which_layout_a_scale_has():
    x = torch.empty(256, 256)
    assert operands.block_of(torch.empty(2, 2), x) == 128 and operands.group_of(torch.empty(2, 2), x) == 0
    assert operands.group_of(torch.empty(256, 2), x) == 128 and operands.group_of(torch.empty(256, 8), x) == 32
    for scale in (torch.empty(1), torch.empty(256, 1), torch.empty(1, 256), torch.empty(256, 256)):
        assert not operands.is_along_input(scale, x) and operands.broadcast_scale(scale, x).ndim == 2
    assert operands.group_of(torch.empty(256, 1), torch.empty(256, 128)) == 0  # a row is one group: both mean the same


@over(shape=[(3, 256), (256, 3), (2, 3), (256,), (3,), (1, 1, 2), (256, 2, 1)])
def test_scales_that_fit_nothing_are_refused(shape):
    x, codes, scale = torch.ones(256, 256), torch.ones(256, 256).to(E4M3), torch.ones(shape)
    for backend in ("reference", None):
        with on(backend):
            if shape != (256,):  # which broadcasts along the columns
                with pytest.raises(FP8ScaleError, match=r"a scale of shape .*expected \(1,\).*by groups"):
                    ops.cast_to_fp8(x, scale, E4M3, 448.0)
            with pytest.raises(FP8ScaleError, match="does not fit a weight of shape"):
                ops.linear(x, codes, scale, None, None, full_scale=448.0)
