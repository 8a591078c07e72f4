"""The observer "moving_average": an average over batches in their order, which merging cannot give."""

import pytest
import torch

from optimum_fp8 import FP8Config, Measurements, convert, finalize_calibration, prepare
from optimum_fp8.errors import FP8MeasurementError


def measured(*sizes, per_head=False):
    measurements = Measurements("f", observer="moving_average")
    for size in sizes:
        x = torch.full((4, 2, 3), float(size))
        measurements.observe("fc", "input", x, per_head=per_head)
    return measurements


@pytest.mark.parametrize("per_head", [False, True])
def test_the_average_by_hand_depends_on_the_order(per_head):
    average = 8.0
    for size in (2.0, 32.0, 1.0):
        average = 0.9 * average + 0.1 * size
    found = measured(8, 2, 32, 1, per_head=per_head)
    assert found.range("fc").item() == pytest.approx(average)
    assert found.at("fc").largest("input") == 32 and found.tensors["fc", "input"].statistics()["count"] == 4 * 24
    assert measured(1, 32, 2, 8).range("fc").item() != pytest.approx(average)


@pytest.mark.core
def test_two_cannot_be_merged_and_the_message_says_why(tmp_path):
    one, other = measured(1, 2), measured(3)
    with pytest.raises(FP8MeasurementError, match="'moving_average' cannot be merged: .*depends on the order"):
        one.merged(other)
    one.save(tmp_path / "m")
    again = Measurements.load(tmp_path / "m")
    assert again.range("fc") == one.range("fc")
    again.observe("fc", "input", torch.full((1,), 8.0))
    assert again.range("fc").item() == pytest.approx(0.9 * one.range("fc").item() + 0.8), "and it goes on from a file"


def test_modules_that_share_an_input_each_average_it(tmp_path):
    class Shared(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)

        def forward(self, x):
            return self.a(x) + self.b(x)

    config = FP8Config(observer="moving_average", dump_stats_path=tmp_path / "m")
    model = prepare(Shared(), config)
    for size in (4.0, 2.0):
        model(torch.full((1, 4), size))
    found = finalize_calibration(model)
    assert found.range("a").item() == found.range("b").item() == pytest.approx(3.8)
    assert convert(model).a.input_scale.numel() == 1


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_is_not_forgotten(value):
    found = measured(1, value, *[1] * 50)
    with pytest.raises(FP8MeasurementError, match="NaN or Inf"):
        found.range("fc")
