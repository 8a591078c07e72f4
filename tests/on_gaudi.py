"""What the tests on emulated cards share: the cards, a call on the reference and on one of them, how near they are."""

import pytest
import torch

from optimum_fp8 import ops
from optimum_fp8.formats import number_format
from optimum_fp8.test_utils import gaudi

FORMATS = ("E4M3", "E5M2")


@pytest.fixture(params=["gaudi2", "gaudi3"])
def device(request):
    with gaudi.emulated(request.param) as emulated:
        yield emulated


@pytest.fixture
def gaudi2():
    with gaudi.emulated("gaudi2") as emulated:
        yield emulated


@pytest.fixture
def gaudi3():
    with gaudi.emulated("gaudi3") as emulated:
        yield emulated


def fmt_of(device, fp8_config="E4M3"):
    """The number format of an emulated card."""
    return number_format(fp8_config, device.chip.name.lower())


def both(call):
    """What a call gives on Gaudi's kernels, and on the reference."""
    with ops.backend("hpu"):
        found = call()
    with ops.backend("reference"):
        return found, call()


def assert_near(found, expected, terms=1, before=None):
    """One unit in the last place apart at most, but for the order of a float32 sum of so many terms.

    Args:
        before: a value that was rounded on the way, which may be a unit apart as well.
    """
    assert found.shape == expected.shape and found.dtype == expected.dtype
    if not expected.numel():
        return
    assert torch.equal(found.isnan(), expected.isnan())
    found, wide = found.double().nan_to_num(), expected.double().nan_to_num()
    units = wide.abs() if before is None else wide.abs() + before.double().abs()
    bound = units * torch.finfo(expected.dtype).eps + terms * 2.0**-24 * float(units.max())
    assert float(((found - wide).abs() - bound).max()) <= 0


def same_codes(found, expected):
    """Whether codes stand for the same values; a NaN has several."""
    return torch.equal(found.float().nan_to_num(nan=1e9), expected.float().nan_to_num(nan=1e9))


def constant(scale):
    """A scale that is known when a model starts."""
    assert ops.mark_constant(scale, number_format("E4M3", "gaudi2").hardware_scales)
    return scale
