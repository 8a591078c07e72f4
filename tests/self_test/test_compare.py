"""Differences between results: elements by their bits, or units in the last place of bfloat16."""

from __future__ import annotations

import math

import pytest
import torch

from optimum_fp8.errors import FP8OperandError
from optimum_fp8.self_test.compare import difference

NAN, INF = math.nan, math.inf


def bf16(*values):
    return torch.tensor(values, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("found", "expected", "ulps"),
    [
        (bf16(1.0, -3.0), bf16(1.0, -3.0), 0.0),
        (bf16(1.0078125), bf16(1.0), 1.0),
        (bf16(-1.9921875), bf16(-2.0), 0.5),  # the unit is that of the expected value
        (bf16(1.0), bf16(1.0078125), 1.0),
        (bf16(16.0, 1.0625), bf16(16.0, 1.0), 8.0),  # a sixteenth of the largest: still its own unit
        (bf16(16.0, 0.0078125), bf16(16.0, 0.0), 1.0),  # below: the unit of that sixteenth
        (bf16(0.0), bf16(0.0), 0.0),
        (bf16(NAN, INF), bf16(NAN, INF), 0.0),
        (bf16(1.0, 2.0), bf16(NAN, 2.0), INF),
        (bf16(NAN, 2.0), bf16(1.0, 2.0), INF),
        (bf16(-INF), bf16(INF), INF),
        (bf16(1.0), bf16(INF), INF),
        (bf16(), bf16(), 0.0),
        (torch.tensor([1.0 + 2.0**-11]), torch.tensor([1.0]), 0.0625),
    ],
)
def test_units_in_the_last_place(found, expected, ulps):
    assert difference(found, expected, exact=False) == ulps


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float32, torch.bfloat16])
def test_elements_that_differ(dtype):
    values = torch.tensor([0.0, -0.0, 1.0, NAN, 2.0])
    same, other = values.to(dtype), torch.tensor([-0.0, -0.0, 1.0, 0.0, 2.0]).to(dtype)
    assert difference(same, same.clone(), exact=True) == 0
    assert difference(other, same, exact=True) == 2
    negative_nan = torch.tensor([0.0, -0.0, 1.0, math.copysign(NAN, -1), 2.0]).to(dtype)
    assert difference(negative_nan, same, exact=True) == 0, "all NaN are the same"


def test_all_outputs_count():
    one, two = torch.tensor([1, 2]), torch.tensor([1.0])
    assert difference((one, two), (one, two), exact=True) == 0
    assert difference((one + 1, two + 1), (one, two), exact=True) == 3
    with pytest.raises(ValueError):
        difference((one,), (one, two), exact=True)


@pytest.mark.parametrize("found", [torch.ones(2), torch.ones(1, dtype=torch.float64), torch.ones(1, 1)])
def test_another_shape_or_dtype_is_an_error(found):
    with pytest.raises(FP8OperandError, match="expected"):
        difference(found, torch.ones(1), exact=True)
