"""What is kept on a tensor holds until the tensor is written to, and not of copies."""

from __future__ import annotations

import copy
import io

import pytest
import torch

from optimum_fp8 import ops
from optimum_fp8.formats import number_format
from optimum_fp8.ops.remembered import forget, recall, remember

pytestmark = pytest.mark.core
HARDWARE = number_format("E4M3", "gaudi2").hardware_scales


def pickled(tensor):
    buffer = io.BytesIO()
    torch.save(tensor, buffer)
    return torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)


def parameter():
    return torch.nn.Parameter(buffer(), requires_grad=False)


def buffer():
    return torch.full((1,), 1 / 16)


# What keeps its attributes: a parameter that is copied in memory loses them.
COPIES = {"deepcopy": (buffer, copy.deepcopy), "pickle": (parameter, pickled)}


def test_until_it_is_written_to():
    scale = buffer()
    assert recall(scale, "seen") is None
    remember(scale, "seen", "this")
    assert recall(scale, "seen") == "this"
    scale.mul_(2)
    assert recall(scale, "seen") is None
    remember(scale, "seen", "that")
    assert recall(scale, "seen") == "that"
    forget(scale, "seen")
    assert recall(scale, "seen") is None


def test_in_inference_mode():
    with torch.inference_mode():
        scale = torch.ones(1)
        remember(scale, "seen", 1)
        assert recall(scale, "seen") == 1


@pytest.mark.parametrize("make, copied", COPIES.values(), ids=COPIES)
def test_not_of_a_copy(make, copied):
    scale = make()
    remember(scale, "seen", 1)
    assert recall(copied(scale), "seen") is None and recall(scale, "seen") == 1


@pytest.mark.parametrize("make, copied", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize("writes", [0, 1])
def test_a_constant_is_read_anew_of_a_copy(make, copied, writes):
    """A tensor written to after it was marked has a copy of other values, whose writes are counted from nothing."""
    scale = make()
    assert ops.mark_constant(scale, HARDWARE) and ops.constant_of(scale) == 1 / 16
    for _ in range(writes):
        scale.mul_(16)
    made = copied(scale)
    assert ops.constant_of(scale) == ops.constant_of(made) == (None if writes else 1 / 16)
    assert ops.constant_of(copied(made)) == (None if writes else 1 / 16)


@pytest.mark.parametrize("make, copied", COPIES.values(), ids=COPIES)
def test_an_inverse_is_that_of_the_copy(make, copied):
    scale = make()
    ops.keep_inverse(scale)
    scale.mul_(16)
    made = copied(scale)
    assert ops.inverse_of(made).item() == ops.inverse_of(scale).item() == 1.0
