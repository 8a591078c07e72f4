"""Mean average precision of boxes, beside cases worked out by hand and scikit-learn's ranking."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[3] / "examples" / "vision"))

from average_precision import Boxes, average_precision, hits, mean_average_precision, overlap

SQUARE = [0.0, 0.0, 10.0, 10.0]
HALF = [0.0, 0.0, 10.0, 5.0]  # half of the square
AWAY = [20.0, 20.0, 30.0, 30.0]


def boxes(places, kinds=None, scores=None):
    count = len(places)
    found = torch.tensor(places, dtype=torch.float64).reshape(count, 4)
    return Boxes(found, torch.tensor(kinds or [0] * count), torch.tensor(scores or [1.0] * count))


def test_overlap():
    found = overlap(torch.tensor([SQUARE, HALF]), torch.tensor([SQUARE, AWAY, [5.0, 0.0, 15.0, 10.0]]))
    assert torch.allclose(found, torch.tensor([[1, 0, 1 / 3], [0.5, 0, 1 / 5]]))


def test_each_box_of_the_truth_is_found_once():
    found = boxes([SQUARE, SQUARE, AWAY])
    assert hits(found, boxes([SQUARE, HALF]), 0.5).tolist() == [True, True, False]
    assert hits(found, boxes([SQUARE, HALF]), 0.6).tolist() == [True, False, False]
    assert hits(found, boxes([]), 0.5).tolist() == [False] * 3


def test_by_hand():
    truth = [boxes([SQUARE, AWAY]), boxes([SQUARE])]
    assert mean_average_precision(truth, truth) == 1
    assert mean_average_precision([boxes([]), boxes([])], truth) == 0
    # Hit, miss, hit, by falling score; the third is never found: (1 + 2/3) / 3.
    found = [boxes([SQUARE, HALF], scores=[0.9, 0.5]), boxes([SQUARE], scores=[0.3])]
    assert mean_average_precision(found, truth) == pytest.approx((1 + 2 / 3) / 3)
    # A class of its own counts as much; one that is found and is not there does not.
    truth.append(boxes([AWAY], kinds=[3]))
    found.append(boxes([AWAY, AWAY], kinds=[3, 5]))
    assert mean_average_precision(found, truth) == pytest.approx((1 + (1 + 2 / 3) / 3) / 2)


def test_thresholds_are_averaged():
    truth, found = [boxes([SQUARE])], [boxes([[0.0, 0.0, 10.0, 7.2]])]
    assert mean_average_precision(found, truth, [0.5, 0.6, 0.7, 0.8]) == 0.75


def test_never_below_the_area_of_scikit_learn():
    """Which takes no envelope: what it gives is at most that of the interpolated curve, and equal without a dip."""
    from sklearn.metrics import average_precision_score

    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(40, generator=generator)
    right = torch.rand(40, generator=generator) < scores
    found = [boxes([SQUARE if hit else AWAY], scores=[float(score)]) for hit, score in zip(right, scores, strict=True)]
    # A box where nothing is counts as wrong; those pictures have no truth.
    truth = [boxes([SQUARE]) if hit else boxes([]) for hit in right]
    plain = average_precision_score(right.numpy(), scores.numpy())
    ours = average_precision(found, truth, 0, 0.5)
    assert plain <= ours <= plain + 0.05
