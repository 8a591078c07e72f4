"""Padded rows are calibrated as they are without their padding, whether or not calibration goes on decoding."""

from __future__ import annotations

import pytest
import torch
from attention_models import FAMILIES

from optimum_fp8 import FP8Config, calibrate, prepare
from optimum_fp8.lifecycle.state import state_of

ROW, PADDING = [9, 10, 11], [60] * 20


def ranges(model, row, mask, **options):
    inputs = {"input_ids": torch.tensor([row]), "attention_mask": torch.tensor([mask])}
    config = FP8Config(dataset=[inputs], ignore_modules_wo_measures=True, **options)
    return {
        key: value.range() for key, value in state_of(calibrate(prepare(model, config))).measurements.tensors.items()
    }


def same(found, expected):
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.allclose(found[key], value, rtol=1e-4), key


@pytest.mark.core
@pytest.mark.parametrize("family", ["gpt2", "opt", "llama", "bloom"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("steps", [0, 1])
def test_padding_changes_no_range(family, side, steps):
    make, ones, zeros = FAMILIES[family].make, [1] * len(ROW), [0] * len(PADDING)
    padded = (PADDING + ROW, zeros + ones) if side == "left" else (ROW + PADDING, ones + zeros)
    expected = ranges(make(), ROW, ones, attention=True, decode_steps=steps)
    same(ranges(make(), *padded, attention=True, decode_steps=steps), expected)


@pytest.mark.parametrize("family", ["gpt2", "opt", "llama", "bert"])
def test_padding_at_the_right_changes_no_range_of_linear_modules(family):
    make, ones = FAMILIES[family].make, [1] * len(ROW)
    same(ranges(make(), ROW + PADDING, ones + [0] * len(PADDING)), ranges(make(), ROW, ones))
