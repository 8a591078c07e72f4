"""What a sound scale is."""

import pytest
import torch

from optimum_fp8.scales import is_sound, unsound

BAD = [0.0, -0.0, -1.0, float("nan"), float("inf"), float("-inf")]


@pytest.mark.core
@pytest.mark.parametrize("scale", [torch.ones(1), torch.tensor([[2.0**-126], [3e38]]), torch.rand(4, 1, 1) + 1e-30])
def test_sound(scale):
    assert is_sound(scale) is True and unsound(scale) is None


@pytest.mark.core
@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("shape", [(1,), (5, 1), (2, 3)])
def test_one_bad_value_is_enough_and_the_text_says_what_was_found_and_expected(value, shape):
    scale = torch.ones(shape)
    scale.view(-1)[-1] = value
    assert is_sound(scale) is False
    text = unsound(scale)
    assert text.startswith("is [") and text.endswith("], expected finite values above 0")


def test_the_text_shows_the_first_values_only():
    assert unsound(torch.full((100, 1), 0.0)) == "is [0.0, 0.0, 0.0, 0.0], expected finite values above 0"


def test_without_data_there_is_nothing_to_find_fault_with():
    assert unsound(torch.empty(3, 1, device="meta")) is None
