"""What FP8 in a part of the tiny diffusion model does: the errors, and which layers a part is."""

from __future__ import annotations

import re

import pytest
import torch

from benchmarks.diffusion_sensitivity import PARTS, errors, load, noisy, predicted, quantized
from optimum_fp8 import quantization_report


def test_errors_of_all_timesteps_and_of_each():
    expected = torch.tensor([[3.0, 4.0], [0.0, 10.0]])
    found = expected + torch.tensor([[0.5, 0.0], [0.0, 2.0]])
    assert errors(found, expected) == pytest.approx([(4.25 / 125) ** 0.5, 0.1, 0.2])


def test_every_part_is_there():
    names = [name for name, module in load().named_modules() if isinstance(module, torch.nn.Linear | torch.nn.Conv2d)]
    assert all(any(re.search(pattern, name) for name in names) for pattern in PARTS.values())


def test_what_reads_the_sample_costs_most():
    batches = noisy("heldout", 8, (20,))
    expected, model = predicted(load(), batches), quantized(PARTS["`conv_in` alone, which reads the sample"])
    assert [row.name for row in quantization_report(model).quantized] == ["conv_in"]
    first, default = (errors(predicted(each, batches), expected)[0] for each in (model, quantized(None)))
    assert first > 2 * default > 0
