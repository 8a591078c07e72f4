"""Casts, bit for bit against ml_dtypes and numpy."""

import ml_dtypes
import numpy as np
import pytest
import torch
from grids import over

from optimum_fp8 import ops
from optimum_fp8.errors import FP8ConfigError

FORMATS = [(torch.float8_e4m3fn, 240.0), (torch.float8_e4m3fn, 448.0), (torch.float8_e5m2, 57344.0)]
NUMPY_DTYPES = {torch.float8_e4m3fn: ml_dtypes.float8_e4m3fn, torch.float8_e5m2: ml_dtypes.float8_e5m2}
ONE = torch.ones(1)


def every_bfloat16():
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)


def by_hand(x, scale, dtype, full_scale):
    """The codes as ml_dtypes casts them: 1/s and the product in float32, clipped."""
    x, scale = x.float().numpy(), scale.numpy()
    with np.errstate(over="ignore", invalid="ignore"):
        clipped = np.clip(x * (np.float32(1) / scale), np.float32(-full_scale), np.float32(full_scale))
        return clipped.astype(NUMPY_DTYPES[dtype])


def assert_same_codes(codes, expected):
    """Equal bytes, zeros' signs included; of NaN any code will do."""
    nan = np.isnan(expected.astype(np.float32))
    assert np.array_equal(codes.float().isnan().numpy(), nan)
    assert np.array_equal(codes.view(torch.uint8).numpy()[~nan], expected.view(np.uint8)[~nan])


@pytest.mark.core
@over(form=FORMATS)
def test_every_bfloat16(form):
    dtype, full_scale = form
    x = every_bfloat16()
    codes = ops.cast_to_fp8(x, ONE, dtype, full_scale)
    assert codes.dtype == dtype and codes.shape == x.shape
    assert_same_codes(codes, by_hand(x, ONE, dtype, full_scale))
    values = codes.float()
    assert torch.equal(values.isnan(), x.isnan())
    assert values[~x.isnan()].abs().max() == full_scale
    assert torch.equal(values[x == torch.inf], torch.tensor([full_scale]))


@over(scale=[2.0**-8, 16.0, 0.09130859375, 3e-5, 1e30, 2.0**-126], form=FORMATS)
def test_every_bfloat16_with_a_scale(scale, form):
    dtype, full_scale = form
    scale = torch.tensor([scale])
    codes = ops.cast_to_fp8(every_bfloat16(), scale, dtype, full_scale)
    assert_same_codes(codes, by_hand(every_bfloat16(), scale, dtype, full_scale))


@over(high=[torch.float16, torch.float32, torch.float64], form=FORMATS)
def test_other_dtypes(high, form):
    dtype, full_scale = form
    x = (torch.randn(10000) * 2.0 ** torch.randint(-14, 15, (10000,))).to(high)
    codes = ops.cast_to_fp8(x, torch.tensor([0.3]), dtype, full_scale)
    assert_same_codes(codes, by_hand(x, torch.tensor([0.3]), dtype, full_scale))


@pytest.mark.core
@pytest.mark.parametrize(
    "x, gaudi2, gaudi3",
    [
        (1.0, 0x38, 0x38),
        (1.0625, 0x38, 0x38),
        (1.1875, 0x3A, 0x3A),
        (17, 0x58, 0x58),
        (19, 0x5A, 0x5A),
        (2**-10, 0x00, 0x00),
        (1.5 * 2**-10, 0x01, 0x01),
        (1.5 * 2**-9, 0x02, 0x02),
        (239.9, 0x77, 0x77),
        (244, 0x77, 0x77),
        (248, 0x77, 0x78),
        (300, 0x77, 0x79),
        (1e6, 0x77, 0x7E),
        (-500, 0xF7, 0xFE),
        (float("nan"), 0x7F, 0x7F),
    ],
)
def test_golden_codes(x, gaudi2, gaudi3):
    for full_scale, code in ((240.0, gaudi2), (448.0, gaudi3)):
        codes = ops.cast_to_fp8(torch.tensor([x], dtype=torch.float32), ONE, torch.float8_e4m3fn, full_scale)
        assert codes.view(torch.uint8).item() == code


def test_reciprocal_and_product_are_rounded_to_float32():
    """Taking 1/s, or x/s, in another precision would give other codes: the data must be able to tell."""
    x, scale = torch.randn(200000) * 100, torch.tensor([0.3])
    codes = ops.cast_to_fp8(x, scale, torch.float8_e4m3fn, 448.0)
    assert_same_codes(codes, by_hand(x, scale, torch.float8_e4m3fn, 448.0))
    ties = torch.tensor([1.0625, 1.1875, 1.3125, 17.0, 19.0, 21.0]).repeat(2000) * torch.linspace(0.01, 3, 12000)
    scales = torch.linspace(0.01, 3, 12000)
    codes = ops.cast_to_fp8(ties, scales, torch.float8_e4m3fn, 448.0)
    assert_same_codes(codes, by_hand(ties, scales, torch.float8_e4m3fn, 448.0))
    divided = (ties / scales).numpy().astype(ml_dtypes.float8_e4m3fn)
    assert not np.array_equal(codes.view(torch.uint8).numpy(), divided.view(np.uint8))


SHAPES = [((6, 4), (6, 1)), ((6, 2, 3, 3), (6, 1, 1, 1)), ((2, 5, 4), (2, 5, 1)), ((5, 4), (5, 1)), ((3, 4), (1,))]


@over(shapes=SHAPES, form=FORMATS)
def test_scale_per_channel_and_per_token(shapes, form):
    (x_shape, scale_shape), (dtype, full_scale) = shapes, form
    x, scale = torch.randn(x_shape) * 10, torch.rand(scale_shape) + 0.01
    codes = ops.cast_to_fp8(x.bfloat16(), scale, dtype, full_scale)
    assert_same_codes(codes, by_hand(x.bfloat16(), scale, dtype, full_scale))
    back = ops.cast_from_fp8(codes, scale, torch.float32)
    assert np.array_equal(back.numpy(), codes.float().numpy() * scale.numpy())


@over(high=[torch.bfloat16, torch.float16, torch.float32], scale=[1.0, 2.0**-9, 0.09130859375], dtype=NUMPY_DTYPES)
def test_every_code_back(dtype, scale, high):
    raw = np.arange(256, dtype=np.uint8)
    values = ops.cast_from_fp8(torch.from_numpy(raw).view(dtype), torch.tensor([scale]), high)
    with np.errstate(over="ignore", invalid="ignore"):
        expected = raw.view(NUMPY_DTYPES[dtype]).astype(np.float32) * np.float32(scale)
        numpy_dtype = {torch.bfloat16: ml_dtypes.bfloat16, torch.float16: np.float16, torch.float32: np.float32}[high]
        expected = expected.astype(numpy_dtype).astype(np.float32)
    assert values.dtype == high
    assert np.array_equal(values.float().numpy(), expected, equal_nan=True)


@over(form=FORMATS)
def test_every_finite_code_survives_the_round_trip(form):
    dtype, full_scale = form
    codes = torch.arange(256, dtype=torch.uint8).view(dtype)
    codes = codes[codes.float().abs() <= full_scale]
    back = ops.cast_to_fp8(ops.cast_from_fp8(codes, ONE, torch.bfloat16), ONE, dtype, full_scale)
    assert torch.equal(back.view(torch.uint8), codes.view(torch.uint8))


@over(shape=[(0,), (0, 8), (3, 0, 2), ()], form=FORMATS)
def test_empty_and_zero_dimensional(shape, form):
    dtype, full_scale = form
    x, scale = torch.ones(shape), torch.tensor(1.0) if shape == () else ONE
    codes = ops.cast_to_fp8(x, scale, dtype, full_scale)
    assert codes.shape == shape and codes.dtype == dtype
    assert torch.equal(ops.cast_from_fp8(codes, scale, torch.float32), x)


def test_non_contiguous():
    x = torch.randn(8, 6, 4)
    for view in (x.transpose(0, 2), x[:, ::2], x[..., 1], x.expand(2, 8, 6, 4)):
        codes = ops.cast_to_fp8(view, ONE, torch.float8_e4m3fn, 448.0)
        assert_same_codes(codes, by_hand(view.contiguous(), ONE, torch.float8_e4m3fn, 448.0))


def test_input_is_left_alone():
    x = torch.tensor([1e6, -1e6, 0.3])
    before = x.clone()
    ops.cast_to_fp8(x, ONE, torch.float8_e4m3fn, 448.0)
    assert torch.equal(x, before)


@pytest.mark.parametrize(
    "dtype, full_scale",
    [
        (torch.float8_e4m3fn, 449.0),
        (torch.float8_e4m3fn, 57344.0),
        (torch.float8_e5m2, 57345.0),
        (torch.float8_e4m3fn, 0.0),
        (torch.float8_e4m3fn, float("nan")),
        (torch.float8_e4m3fnuz, 240.0),
        (torch.float16, 448.0),
    ],
)
def test_codes_that_cannot_be_made_are_refused(dtype, full_scale):
    x, table = torch.ones(2, 4).bfloat16(), torch.ones(1 << 15)
    with pytest.raises(FP8ConfigError, match=f"full_scale={full_scale}|a cast to {dtype}"):
        ops.cast_to_fp8(x, ONE, dtype, full_scale)
    with pytest.raises(FP8ConfigError, match=f"full_scale={full_scale}|a cast to {dtype}"):
        ops.cast_to_fp8_by_range(x, table, per_row=True, dtype=dtype, full_scale=full_scale)


def test_a_scalar_stays_one_on_every_backend():
    for backend in (*ops.cpu.backends(), "reference"):
        with ops.backend(backend):
            codes = ops.cast_to_fp8(torch.tensor(3.0), ONE, torch.float8_e4m3fn, 448.0)
            assert codes.shape == () and ops.cast_from_fp8(codes, ONE, torch.float32).shape == ()
