"""The observer "maxabs": exact, mergeable in any order, in any dtype, per head where there are heads."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from optimum_fp8.measure import observer_class

MaxAbs = observer_class("maxabs")
tensors = st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=20).map(torch.tensor)


def seen(*tensors, per_head=False):
    observer = MaxAbs()
    for x in tensors:
        observer.update_per_head(x) if per_head else observer.update(x)
    return observer


def merged(*observers):
    result = MaxAbs()
    for observer in observers:
        result.merge(observer)
    return result


def values(observer):
    return (observer.range().item(), observer.statistics()["count"].item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_of_a_tensor(dtype):
    observer = seen(torch.tensor([[1.0, -3.5], [2.0, 0.0]], dtype=dtype))
    assert values(observer) == (3.5, 4) and observer.range_per_head() is None
    maxabs, count = observer.statistics().values()
    assert (maxabs.dtype, maxabs.shape) == (torch.float32, ())
    assert (count.dtype, count.shape) == (torch.int64, ())


@pytest.mark.core
def test_per_head_and_over_all():
    x = torch.randn(10, 3, 4).bfloat16()
    observer = seen(x, x / 2, per_head=True)
    assert torch.equal(observer.range_per_head(), x.abs().amax((0, 2)).float())
    assert values(observer) == (x.abs().max().item(), 2 * x.numel())


def test_heads_that_do_not_fit_together_leave_the_whole():
    few, many = seen(torch.ones(4, 2, 3), per_head=True), seen(2 * torch.ones(4, 3, 3), per_head=True)
    both = merged(few, many)
    assert both.range() == 2 and both.range_per_head() is None
    both.merge(few)
    assert both.range_per_head() is None, "what was left out once does not come back with a part of the data"
    assert merged(few, seen(torch.ones(3))).range_per_head() is None
    assert few.range_per_head() is not None


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_not_lost(value):
    assert not seen(torch.tensor([1.0, value]), torch.ones(1)).range().isfinite()


@given(tensors, tensors, tensors)
def test_merging_is_measuring_everything_at_once(a, b, c):
    one, two, three = (seen(x) for x in (a, b, c))
    whole = values(seen(torch.cat([a, b, c])))
    assert values(merged(merged(one, two), three)) == whole
    assert values(merged(three, merged(one, two))) == whole == values(seen(a, b, c))
