"""The values of scales and codes."""

from __future__ import annotations

import pytest
import torch
from verifying.conftest import UP, edit, told

from optimum_fp8.verifying.values import decoded_scale

SCALE = f"{UP}.weight_scale"
OTHERS = {"format": "pt"}  # no record: as other tools write files


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0, -1.0])
@pytest.mark.parametrize("name", [SCALE, f"{UP}.input_scale"])
def test_scales_that_are_not_sound(copied, name, value):
    folder = copied("compressed-tensors")
    edit(folder, lambda tensors: tensors[name].fill_(value), OTHERS)
    assert any(each.startswith(f"error: {name}: found [{value}]") for each in told(folder))


def test_a_scale_that_looks_as_if_it_was_never_set(copied):
    folder = copied("compressed-tensors")
    edit(folder, lambda tensors: tensors[SCALE].fill_(1), OTHERS)
    assert any(each.startswith(f"warning: {SCALE}: found a scale of exactly 1") for each in told(folder))


@pytest.mark.parametrize("code, message", [(0x7F, "codes that are NaN"), (0, "codes that are all zero")])
def test_codes_that_are_no_weight(copied, code, message):
    folder = copied("compressed-tensors")
    edit(folder, lambda tensors: tensors[f"{UP}.weight"].view(torch.uint8).fill_(code), OTHERS)
    assert any(each.startswith(f"error: {UP}.weight: found {message}") for each in told(folder))


def test_other_tensors_are_finite(copied):
    folder, name = copied("compressed-tensors"), "model.layers.0.input_layernorm.weight"
    edit(folder, lambda tensors: tensors.update({name: torch.full((32,), torch.nan)}), OTHERS)
    assert any(each.startswith(f"error: {name}: found values that are NaN") for each in told(folder))


def test_bytes_of_e8m0_are_powers_of_two():
    found = decoded_scale(torch.tensor([127, 128, 120, 255], dtype=torch.uint8))
    assert found[:3].tolist() == [1.0, 2.0, 2.0**-7] and found[3].isnan()
    assert decoded_scale(torch.tensor([0.5], dtype=torch.bfloat16)).dtype is torch.float32
