"""Casts of the emulated operators, bit for bit against ml_dtypes."""

import ml_dtypes
import numpy as np
import pytest
import torch
from grids import over

from optimum_fp8.test_utils import gaudi

E4M3, E5M2, BF16 = torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16
FULL_SCALE = {("GAUDI2", E4M3): 240.0, ("GAUDI3", E4M3): 448.0}
NUMPY = {E4M3: ml_dtypes.float8_e4m3fn, E5M2: ml_dtypes.float8_e5m2}


def hpu():
    return torch.ops.hpu


def by_hand(x, scale, dtype, chip):
    full_scale = FULL_SCALE.get((chip, dtype), 57344.0)
    scaled = x.float().numpy() * np.asarray(scale, np.float32)
    return np.clip(scaled, -full_scale, full_scale).astype(NUMPY[dtype]).view(np.uint8)


def codes(tensor):
    return tensor.view(torch.uint8).numpy()


def every_finite_bfloat16():
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(BF16)
    return x[x.isfinite()]


@over(case=[(2.0**-4, E4M3), (0.3, E4M3), (0.3, E5M2)])
def test_every_bfloat16_with_a_scale(device, case):
    scale, dtype = case
    x = every_finite_bfloat16()
    expected = by_hand(x, scale, dtype, device.chip.name)
    out, amax = hpu().cast_to_fp8_v2(x, scale, False, False, dtype)
    assert out.dtype == dtype and np.array_equal(codes(out), expected)
    assert amax.shape == (0,) and amax.dtype == torch.float32
    for given in (torch.tensor(scale), torch.tensor([scale])):
        assert np.array_equal(codes(hpu().cast_to_fp8_v2(x[::97], given, False, False, dtype)[0]), expected[::97])


@pytest.mark.core
def test_the_scale_multiplies_when_casting_to_and_from(gaudi2):
    x = torch.tensor([24.0, -3.0], dtype=BF16)
    cast = hpu().cast_to_fp8_v2(x, torch.tensor([1 / 16]), False, False, E4M3)[0]
    assert gaudi2.decode(cast).tolist() == [1.5, -0.1875]
    assert hpu().cast_from_fp8(cast, torch.tensor([16.0]), BF16).tolist() == [24.0, -3.0]


@over(shapes=[((6, 4), (6, 1)), ((6, 4), (4,)), ((2, 3, 4), (3, 1)), ((4,), (1, 1))])
def test_scales_broadcast_by_trailing_dimensions(device, shapes):
    x, scale = torch.randn(shapes[0]) * 50, torch.rand(shapes[1]) + 0.5
    out = hpu().cast_to_fp8_v2(x, scale, False, False, E4M3)[0]
    expected = by_hand(x, scale.expand(shapes[0]) if scale.numel() > 1 else 1, E4M3, device.chip.name)
    if scale.numel() == 1:
        expected = by_hand(x, scale.item(), E4M3, device.chip.name)
    assert out.shape == x.shape and np.array_equal(codes(out), expected)


def test_a_list_of_scales_takes_its_shape(device):
    x, scales = torch.randn(3, 5), [1.0, 2.0, 4.0]
    out = hpu().cast_to_fp8_v2(x, scales, False, False, E4M3, [3, 1])[0]
    assert np.array_equal(codes(out), by_hand(x, np.array(scales)[:, None], E4M3, device.chip.name))
    back = hpu().cast_from_fp8(out, [1.0, 0.5, 0.25], torch.float32, [3, 1])
    assert torch.equal(back, device.decode(out) * torch.tensor([[1.0], [0.5], [0.25]]))
    with pytest.raises(RuntimeError, match=r"Number of scale elements \(3\) is not equal to .* elements \(4\)"):
        hpu().cast_to_fp8_v2(x, scales, False, False, E4M3, [4, 1])


def test_amax_is_of_the_unscaled_input(device):
    x = torch.tensor([[-7.5, 2.0]], dtype=BF16)
    amax = hpu().cast_to_fp8_v2(x, 0.25, False, True, E4M3)[1]
    assert amax.shape == () and amax.dtype == torch.float32 and amax.item() == 7.5


def test_codes_are_cast_with_a_scale_too(gaudi2):
    x = hpu().cast_to_fp8_v2(torch.tensor([100.0, 200.0]), None, False, False, E4M3)[0]
    out = hpu().cast_to_fp8_v2(x, 2.0, False, False, E4M3)[0]
    assert gaudi2.decode(out).tolist() == [2 * gaudi2.decode(x)[0].item(), 240.0]


@over(dtype=[E4M3, E5M2], out_dtype=[BF16, torch.float32], scale=[None, 2.0**-4, 0.3])
def test_casting_back_rounds_once(device, dtype, out_dtype, scale):
    x = torch.arange(256, dtype=torch.uint8).view(dtype)
    values = device.decode(x)
    expected = (values if scale is None else values * torch.tensor(scale)).to(out_dtype)
    given = None if scale is None else torch.tensor(scale)
    out = hpu().cast_from_fp8(x, given, out_dtype)
    assert out.dtype == out_dtype and torch.equal(out.nan_to_num(7), expected.nan_to_num(7))


def test_hybrid_gives_both_formats(device):
    x = torch.randn(64) * 100
    wide, narrow, amax = hpu().cast_to_fp8_hybrid(x, torch.tensor(0.5), torch.tensor(2.0), False, True)
    assert np.array_equal(codes(wide), by_hand(x, 0.5, E5M2, device.chip.name))
    assert np.array_equal(codes(narrow), by_hand(x, 2.0, E4M3, device.chip.name))
    assert amax.item() == x.abs().max().item()


def test_stochastic_rounding_follows_the_seed():
    x = torch.linspace(0.1, 9, 1000)
    results = []
    for seed in (0, 0, 1):
        with gaudi.emulated("gaudi3", seed=seed):
            results.append(hpu().cast_to_fp8_v2(x, None, True, False, E4M3)[0].view(torch.uint8))
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])


X = torch.ones(4, 4)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: hpu().cast_to_fp8_v2(X.half(), None, False, False, E4M3), "input dtype must be one of"),
        (lambda: hpu().cast_to_fp8_v2(X, None), "dtype must be one of"),
        (lambda: hpu().cast_to_fp8_v2(X, None, False, False, torch.float8_e4m3fnuz), "dtype must be one of"),
        (lambda: hpu().cast_to_fp8_v2(X.to(E4M3), None, False, True, E4M3), "must have no amax for float8"),
        (lambda: hpu().cast_to_fp8_v2(X.to(E4M3), None, False, False, E5M2), "must have the same dtype for float8"),
        (lambda: hpu().cast_to_fp8_v2(X, torch.ones(3), False, False, E4M3), r"shape \(3,\) does not broadcast onto"),
        (lambda: hpu().cast_to_fp8_v2(X, torch.ones(2, 4, 1), False, False, E4M3), "does not broadcast onto"),
        (lambda: hpu().cast_to_fp8_v2(X, torch.ones(1).half(), False, False, E4M3), "scale must be one of"),
        (lambda: hpu().cast_from_fp8(X, None, BF16), "CastFromFp8 input dtype"),
        (lambda: hpu().cast_from_fp8(X.to(E4M3), None, torch.float16), "must be equal to float or bfloat16"),
        (lambda: hpu().cast_from_fp8(X.to(E4M3)), "missing"),
        (lambda: hpu().cast_to_fp8_hybrid(X.half()), "cast_to_fp8_hybrid: input"),
        (lambda: hpu().cast_to_fp8_v2(X, None, False, False, E4M3, scale_inv=1.0), "Unknown keyword|positional"),
    ],
)
def test_refused(gaudi2, call, message):
    with pytest.raises(RuntimeError, match=message):
        call()
    assert gaudi2.calls == []
