"""Fixtures: an emulated card of each generation."""

import pytest

from optimum_fp8.test_utils import gaudi


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
