"""What FP8 in a part of a model does, as the benchmark measures it: beside figures worked out by hand."""

from __future__ import annotations

import pytest
import torch

from benchmarks.part_sensitivity import CASES, Sensitivity, divergence, in_float32, sensitivity


def test_divergence_is_that_of_the_probabilities():
    expected, found = torch.tensor([[0.0, 0.0], [5.0, 5.0]]), torch.tensor([[0.0, 0.0], [1.0, 0.0]])
    p = torch.tensor([1.0, 0.0]).softmax(-1).double()
    by_hand = float((0.5 * (0.5 / p).log()).sum()) / 2
    assert divergence(expected, found) == pytest.approx(by_hand, rel=1e-6)
    assert divergence(expected, expected + 3) == pytest.approx(0, abs=1e-12)


def test_cells_say_what_was_not_measured():
    assert Sensitivity(3, None, None, 0.25, -0.015).cells() == ("3", "", "", "25.00%", "-1.50")
    assert Sensitivity(3, 0.5, 2e-3, 0.0, None).cells() == ("3", "0.5000", "2.0e-03", "0.00%", "")


def test_the_stem_of_a_resnet_alone():
    case = CASES["tiny_resnet"]()
    case = case._replace(calibration=case.calibration[:1], heldout=case.heldout[:2], metric=None)
    found = sensitivity(case, case.parts["stem"], in_float32(case))
    assert found.layers == 1 and 0 < found.error < 0.1 and found.kl > 0
