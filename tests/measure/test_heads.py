"""Statistics of attention's operands: over all and per head, merged, stored, and without padding."""

from __future__ import annotations

import pytest
import torch

from optimum_fp8 import Measurements
from optimum_fp8.errors import FP8MeasurementError
from optimum_fp8.measure import Observers, TensorStatistics

X = torch.randn(2, 3, 5, 4)  # batch, heads, length, size


@pytest.fixture
def observers():
    return Observers(Measurements("a model"))


def seen(observers, kind):
    return observers.measurements.tensors["attn", kind]


@pytest.mark.core
def test_per_head_and_over_all(observers):
    observers.see_heads("attn", "q", X)
    found = seen(observers, "q")
    assert torch.equal(found.maxabs_per_head, X.abs().amax((0, 2, 3))) and found.maxabs == X.abs().max()
    assert found.count == X.numel()
    observers.see_heads("attn", "q", 2 * X)
    assert torch.equal(seen(observers, "q").maxabs_per_head, 2 * X.abs().amax((0, 2, 3)))


def test_heads_that_do_not_fit_together_leave_the_whole():
    few, many = TensorStatistics.of_heads(torch.ones(4, 2, 3)), TensorStatistics.of_heads(2 * torch.ones(4, 3, 3))
    merged = few.merged(many)
    assert merged.maxabs == 2 and merged.maxabs_per_head is None
    assert few.merged(TensorStatistics.of(torch.ones(3))).maxabs_per_head is None


@pytest.mark.core
def test_padding_is_left_out(observers):
    x, mask = X.clone(), torch.ones(2, 5)
    mask[0, :2] = 0
    x[0, :, :2] = 100.0
    with observers.only_where(mask):
        observers.see_heads("attn", "q", x)
    assert seen(observers, "q").count == X.numel() - 2 * 3 * 4 and seen(observers, "q").maxabs < 100


def test_keys_that_go_beyond_the_prompt_keep_its_padding_out(observers):
    x, mask = torch.cat([X, X], dim=2), torch.ones(2, 5)
    mask[0, :2] = 0
    x[0, :, :2] = 100.0
    with observers.only_where(mask):
        observers.see_heads("attn", "k", x)
        observers.see_heads("attn", "q", X[:, :, :1])  # the token that is decoded is never padding
    assert seen(observers, "k").count == x.numel() - 2 * 3 * 4 and seen(observers, "k").maxabs < 100
    assert seen(observers, "q").count == 2 * 3 * 4


@pytest.mark.core
def test_stored_and_read_again(observers, tmp_path):
    observers.see_heads("attn", "k_cache", X)
    observers.see_whole("attn", "q2", X[0])
    observers.see_whole("attn", "p10", X[1])
    observers.measurements.save(tmp_path / "stats")
    again = Measurements.load(tmp_path / "stats")
    assert torch.equal(again.maxabs_per_head("attn", "k_cache"), X.abs().amax((0, 2, 3)))
    assert again.maxabs("attn", "q2") == X[0].abs().max() and again.maxabs_per_head("attn", "q2") is None
    assert again.maxabs("attn", "p10") == X[1].abs().max()
    assert again.maxabs_per_head("attn", "never") is None
    again.merged(observers.measurements).save(tmp_path / "merged")


def test_nan_is_an_error_that_names_the_module(observers):
    observers.see_heads("attn", "v", X * torch.nan)
    with pytest.raises(FP8MeasurementError, match="attn: the measured v holds NaN"):
        observers.measurements.maxabs_per_head("attn", "v")


def test_other_names_are_no_statistics(observers, tmp_path):
    observers.see_heads("attn", "z", X)
    observers.measurements.save(tmp_path / "stats")
    with pytest.raises(FP8MeasurementError, match="not a statistic"):
        Measurements.load(tmp_path / "stats")
