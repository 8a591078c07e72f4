"""Sums and computed scales of the emulated operators: against torch, and against scales that Gaudi cards computed."""

import math

import pytest
import torch
from grids import over

E4M3, E5M2, BF16 = torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16


def scale_for_cast(*args, **kwargs):
    return torch.ops.hpu.calculate_scale_for_cast(*args, **kwargs)


@over(dim=[None, 0, [1], [0, 2], -1], keepdim=[False, True], out_dtype=[None, torch.float32], dtype=[E4M3, E5M2])
def test_sum(device, dim, keepdim, out_dtype, dtype):
    x = device.encode(torch.randn(3, 4, 5), dtype)
    exact = device.decode(x).double().sum(dim, keepdim)
    out = torch.ops.hpu.sum_fp8(x, dim, keepdim, out_dtype)
    assert out.shape == exact.shape and out.dtype == (out_dtype or dtype)
    if out_dtype is None:
        assert torch.equal(out.view(torch.uint8), device.encode(exact, dtype).view(torch.uint8))
    else:
        assert torch.equal(out.double(), exact)


def test_sums_of_codes_saturate(device):
    x = device.encode(torch.full((9,), 200.0), E4M3)
    assert device.decode(torch.ops.hpu.sum_fp8(x)).item() == device.full_scale(E4M3)


# What Gaudi cards computed: range, scale, where a division would give another power of two.
CARDS = [
    (448, 0.25, 14.0625, 0.125),
    (448, 0.25, 7.03125, 0.0625),
    (448, 0.25, 1.7734375, 0.015625),
    (448, 0.25, 0.88671875, 0.0078125),
    (448, 0.5, 28.125, 0.125),
    (448, 0.5, 3.546875, 0.015625),
    (448, 0.5, 1.7734375, 0.0078125),
    (448, 0.5, 0.88671875, 0.00390625),
    (240, 0.5, 0.47265625, 0.0078125),  # Gaudi2 then takes the next scale it has, 2^-4
    (448, 0.25, 10.25, 0.125),
]


@pytest.mark.parametrize("fullscale, backoff, maxabs, scale", CARDS)
def test_scales_as_the_cards_compute_them(gaudi2, fullscale, backoff, maxabs, scale):
    x = torch.tensor([[0.1, -maxabs, 0.0]], dtype=BF16)
    out = scale_for_cast(x, 1, 1, fullscale=fullscale, backoff=backoff)
    assert out.shape == (1,) and out.dtype == BF16 and out.item() == scale


@over(dtype=[BF16, torch.float32, torch.float16], axis=[0, -1], keepdim=[False, True], rounding=[0, 1])
def test_scales_per_axis(device, dtype, axis, keepdim, rounding):
    x = torch.randn(6, 4).to(dtype)
    out = scale_for_cast(x, 2, rounding, axis, keepdim, 2.0, 4.0)
    plain = x.abs().amax(axis, keepdim) / 8
    assert out.dtype == dtype and out.shape == plain.shape
    assert torch.equal(out, 2.0 ** torch.ceil(torch.log2(plain)) if rounding else plain)


def test_ranges_that_are_given_are_only_rounded(gaudi2):
    x = torch.tensor([0.3, 4.0, 0.0])
    assert scale_for_cast(x, 0, 1, 0, False, 100.0).tolist() == [0.5, 4.0, 0.0]
    assert torch.equal(scale_for_cast(x, 0, 0), x)


@pytest.mark.parametrize(
    "args, message",
    [
        ((torch.ones(2, dtype=torch.float64), 1, 1), "dtype of input"),
        ((torch.ones(2), 3, 1), "no maxMode 3"),
        ((torch.ones(2), 1, 2), "no scaleMode 2"),
        ((torch.ones(2), 2, 1, 1), "no axis 1"),
    ],
)
def test_calculating_scales_refuses(gaudi2, args, message):
    with pytest.raises(RuntimeError, match=message):
        scale_for_cast(*args)


BLOCKS = [[1, 4], [4, 1], [2, 2], [1, 8], [1, 1]]


@over(block=BLOCKS, dtype=[torch.float32, BF16], out_dtype=[None, E5M2], scale_dtype=[None, torch.float32])
def test_casts_with_scales_of_their_own(device, block, dtype, out_dtype, scale_dtype):
    x = (torch.randn(3, 4, 8) * 10).to(dtype)
    x[0, :2, :4] = 0
    codes, scale = torch.ops.hpu.cast_to_fp8_just_in_time(x, block, out_dtype=out_dtype, scale_dtype=scale_dtype)
    assert codes.dtype == (out_dtype or E4M3) and scale.dtype == (scale_dtype or dtype)
    assert scale.shape == (3, 4 // block[0], 8 // block[1])
    spread = scale.float().repeat_interleave(block[0], 1).repeat_interleave(block[1], 2)
    largest = torch.nn.functional.max_pool2d(x.float().abs(), block, block)
    full_scale = device.full_scale(codes.dtype)
    torch.testing.assert_close(scale.float()[largest > 0], largest[largest > 0] / full_scale, rtol=2**-8, atol=0)
    back, step = device.decode(codes) * spread, 2 ** -(3 if codes.dtype == E4M3 else 2)
    assert ((back - x.float()).abs() <= x.float().abs() * step / 2 + spread * 2.0**-9 + full_scale * spread / 256).all()
    assert (back[0, :2, :4] == 0).all()


@pytest.mark.core
def test_blocks_with_scales_are_what_a_product_takes(gaudi2):
    x, weight = torch.randn(8, 16), torch.randn(12, 16)
    codes, scale = torch.ops.hpu.cast_to_fp8_just_in_time(x, [1, 4])
    weight_codes, weight_scale = torch.ops.hpu.cast_to_fp8_just_in_time(weight, [4, 4])
    out = torch.ops.hpu.fp8_gemm_v2(
        codes, False, weight_codes, True, None, torch.float32, scale, weight_scale.t().contiguous()
    )
    error = (out - x @ weight.t()).norm() / (x @ weight.t()).norm()
    assert error < 0.06 and math.isfinite(error)


@pytest.mark.parametrize(
    "args, kwargs, message",
    [
        ((torch.ones(4), [1, 4]), {}, "at least 2 dimensions"),
        ((torch.ones(4, 4), [2, 4]), {}, "must be equal or one of them must be 1"),
        ((torch.ones(4, 6), [1, 4]), {}, "must be divisible by"),
        ((torch.ones(4, 4).half(), [1, 4]), {}, "dtype of input"),
        ((torch.ones(4, 4), [1, 4]), {"out_dtype": BF16}, "out_dtype must be of FP8"),
    ],
)
def test_casting_just_in_time_refuses(gaudi2, args, kwargs, message):
    with pytest.raises(RuntimeError, match=message):
        torch.ops.hpu.cast_to_fp8_just_in_time(*args, **kwargs)
