"""Statistics of a tensor: exact, mergeable in any order, in any dtype."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from optimum_fp8.measure import TensorStatistics
from optimum_fp8.measure.statistics import REDUCTIONS

tensors = st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=20).map(torch.tensor)


def values(statistics):
    return (statistics.maxabs.item(), statistics.count.item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_of_a_tensor(dtype):
    statistics = TensorStatistics.of(torch.tensor([[1.0, -3.5], [2.0, 0.0]], dtype=dtype))
    assert values(statistics) == (3.5, 4)
    assert (statistics.maxabs.dtype, statistics.maxabs.shape) == (torch.float32, ())
    assert (statistics.count.dtype, statistics.count.shape) == (torch.int64, ())


def test_of_a_parameter_keeps_no_graph():
    assert not TensorStatistics.of(torch.nn.Parameter(torch.ones(3))).maxabs.requires_grad


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_not_lost(value):
    statistics = TensorStatistics.of(torch.tensor([1.0, value])).merged(TensorStatistics.of(torch.ones(1)))
    assert not statistics.maxabs.isfinite()


@given(tensors, tensors, tensors)
def test_merging_is_measuring_everything_at_once(a, b, c):
    one, two, three = (TensorStatistics.of(x) for x in (a, b, c))
    whole = values(TensorStatistics.of(torch.cat([a, b, c])))
    assert values(one.merged(two).merged(three)) == whole
    assert values(three.merged(one.merged(two))) == whole


def test_every_statistic_declares_how_it_merges():
    assert set(TensorStatistics.__dataclass_fields__) == set(REDUCTIONS)
