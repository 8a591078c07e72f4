"""Calibration by a function that runs the model."""

import pytest
from torch import nn

from optimum_fp8 import FP8Config
from optimum_fp8.calibration import check_dataset
from optimum_fp8.errors import FP8CalibrationError


def test_it_is_given_the_model_and_nothing_else_is_run():
    given, model = [], nn.Linear(2, 2)
    check_dataset(given.append).run(given.append, model, FP8Config(), lambda batches: given.append(0))
    assert given == [model]


def test_it_has_no_batches(load):
    with pytest.raises(FP8CalibrationError, match="dataset of type function calls the model by itself"):
        load(lambda model: None)


@pytest.mark.parametrize("function", [lambda: ["a"], lambda model, data: None], ids=["none", "two"])
def test_one_that_does_not_take_the_model_is_refused_before_anything_else(function):
    with pytest.raises(FP8CalibrationError, match=r"cannot be called with the model alone .*pass what it returns"):
        check_dataset(function)
