"""FP8 codes of the emulated chips, against ml_dtypes: its `float8_e4m3` ends at 240 and has infinities, as Gaudi2's."""

import ml_dtypes
import numpy as np
import pytest
import torch
from grids import over

from optimum_fp8.test_utils.gaudi.codes import E4M3, E5M2
from optimum_fp8.test_utils.gaudi.device import CHIPS

ORACLES = {
    ("gaudi2", E4M3): (ml_dtypes.float8_e4m3, 240.0),
    ("gaudi3", E4M3): (ml_dtypes.float8_e4m3fn, 448.0),
    ("gaudi2", E5M2): (ml_dtypes.float8_e5m2, 57344.0),
    ("gaudi3", E5M2): (ml_dtypes.float8_e5m2, 57344.0),
}
EVERY_CODE = torch.arange(256, dtype=torch.uint8)


def every_bfloat16():
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()


def near_every_midpoint(form):
    """Float32 numbers at and next to the places where rounding changes, of both signs."""
    middle = form.midpoints
    beside = [torch.nextafter(middle, torch.full_like(middle, to)) for to in (-torch.inf, torch.inf)]
    return torch.cat([middle, *beside, -middle, *(-each for each in beside)])


@pytest.mark.core
@over(case=list(ORACLES))
def test_what_every_code_stands_for(case):
    chip, dtype = case
    values = CHIPS[chip].formats[dtype].decode(EVERY_CODE.view(dtype)).numpy()
    expected = EVERY_CODE.numpy().view(ORACLES[case][0]).astype(np.float32)
    assert np.array_equal(values, expected, equal_nan=True)
    assert np.array_equal(np.signbit(values[[0, 128]]), [False, True])


@pytest.mark.core
@over(case=list(ORACLES), inputs=["bfloat16", "midpoints", "random"])
def test_casts_round_to_nearest_even_and_saturate(case, inputs):
    chip, dtype = case
    form, (oracle, full_scale) = CHIPS[chip].formats[dtype], ORACLES[case]
    random = torch.randn(100000) * 2.0 ** torch.randint(-20, 18, (100000,))
    x = {"bfloat16": every_bfloat16(), "midpoints": near_every_midpoint(form), "random": random}[inputs]
    codes = form.encode(x)
    assert codes.dtype == dtype and form.full_scale == full_scale
    with np.errstate(invalid="ignore"):
        expected = np.clip(x.numpy(), -full_scale, full_scale).astype(oracle).view(np.uint8)
    nan = x.isnan().numpy()
    assert np.array_equal(codes.view(torch.uint8).numpy()[~nan], expected[~nan])
    assert (codes.view(torch.uint8).numpy()[nan] == 0x7F).all()


@pytest.mark.parametrize(
    "x, gaudi2, gaudi3",
    [
        (1.0, 0x38, 0x38),
        (1.0625, 0x38, 0x38),
        (1.1875, 0x3A, 0x3A),
        (17.0, 0x58, 0x58),
        (19.0, 0x5A, 0x5A),
        (2**-10, 0x00, 0x00),
        (1.5 * 2**-10, 0x01, 0x01),
        (1.5 * 2**-9, 0x02, 0x02),
        (239.9, 0x77, 0x77),
        (244.0, 0x77, 0x77),
        (248.0, 0x77, 0x78),
        (300.0, 0x77, 0x79),
        (1e6, 0x77, 0x7E),
        (-500.0, 0xF7, 0xFE),
        (-0.0, 0x80, 0x80),
        (float("inf"), 0x77, 0x7E),
        (float("-inf"), 0xF7, 0xFE),
        (float("nan"), 0x7F, 0x7F),
    ],
)
def test_golden_codes(x, gaudi2, gaudi3):
    for chip, code in (("gaudi2", gaudi2), ("gaudi3", gaudi3)):
        assert CHIPS[chip].formats[E4M3].encode(torch.tensor([x])).view(torch.uint8).item() == code


def test_gaudi2_reads_the_codes_above_240_as_infinity_and_nan():
    values = CHIPS["gaudi2"].formats[E4M3].decode(EVERY_CODE.view(E4M3))
    assert values[0x78] == torch.inf and values[0xF8] == -torch.inf
    assert values[0x79:0x80].isnan().all() and values[0xF9:].isnan().all()
    assert CHIPS["gaudi3"].formats[E4M3].decode(EVERY_CODE.view(E4M3))[0x78:0x7F].tolist() == [*range(256, 449, 32)]


def test_not_the_codes_of_fnuz():
    """Its range is that of Gaudi2, but its bytes mean something else."""
    values = CHIPS["gaudi2"].formats[E4M3].values[:0x78].numpy()
    fnuz, b11 = (
        EVERY_CODE[:0x78].numpy().view(dtype).astype(np.float32)
        for dtype in (ml_dtypes.float8_e4m3fnuz, ml_dtypes.float8_e4m3b11fnuz)
    )
    assert np.array_equal(values, 2 * fnuz) and np.array_equal(values, 16 * b11)


@over(case=list(ORACLES))
def test_stochastic_rounding_keeps_the_mean_and_the_numbers_that_fit(case):
    form = CHIPS[case[0]].formats[case[1]]
    generator = torch.Generator().manual_seed(1)
    x = torch.tensor([1.03, -2.6, 0.011, 1.3 * 2**-10]).repeat(40000, 1)
    codes = form.encode(x, generator)
    values = form.decode(codes)
    low, high = values.amin(0), values.amax(0)
    assert (low < x[0]).all() and (high > x[0]).all()
    error = (values.mean(0) - x[0]) / (high - low)
    assert error.abs().max() < 0.01
    exact = torch.cat([form.numbers, -form.numbers, torch.tensor([1e6, -torch.inf])])
    assert torch.equal(form.decode(form.encode(exact, generator)), exact.clamp(-form.full_scale, form.full_scale))
    assert form.encode(torch.tensor([torch.nan]), generator).view(torch.uint8).item() == 0x7F
