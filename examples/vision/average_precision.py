"""Mean average precision: how well found boxes and their classes agree with what there is."""

from collections.abc import Sequence
from typing import NamedTuple

import torch


class Boxes(NamedTuple):
    """Boxes on one picture.

    Attributes:
        places: left, top, right and bottom in pixels, `[n, 4]`.
        kinds: the class of each, `[n]`.
        scores: how sure a detector is of each, `[n]`; 1 for the truth.
    """

    places: torch.Tensor
    kinds: torch.Tensor
    scores: torch.Tensor


def overlap(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Intersection over union of boxes `[n, 4]` and `[m, 4]`: `[n, m]`."""
    low = torch.maximum(one[:, None, :2], other[None, :, :2])
    high = torch.minimum(one[:, None, 2:], other[None, :, 2:])
    common = (high - low).clamp(min=0).prod(-1)
    areas = [(boxes[:, 2:] - boxes[:, :2]).prod(-1) for boxes in (one, other)]
    return common / (areas[0][:, None] + areas[1][None, :] - common)


def hits(found: Boxes, truth: Boxes, threshold: float) -> torch.Tensor:
    """Whether each box that was found, given by falling score, is the first on one of the truth: `[n]`.

    Each takes the one it overlaps most of those that are still free, as in COCO.
    """
    free, right = set(range(len(truth.places))), []
    for overlaps in overlap(found.places, truth.places).tolist():
        best = max(sorted(free), key=overlaps.__getitem__, default=None)
        right.append(best is not None and overlaps[best] >= threshold)
        if right[-1]:
            free.remove(best)
    return torch.tensor(right, dtype=torch.bool)


def average_precision(found: Sequence[Boxes], truth: Sequence[Boxes], kind: int, threshold: float) -> float:
    """The area below the curve of precision over recall of one class, over all pictures; NaN where there is none."""
    scores, right, total = [], [], 0
    for ours, theirs in zip(found, truth, strict=True):
        order = ours.scores.argsort(descending=True, stable=True)
        order = order[ours.kinds[order] == kind]
        here = theirs.kinds == kind
        total += int(here.sum())
        scores.append(ours.scores[order])
        right.append(hits(Boxes(*(each[order] for each in ours)), Boxes(*(each[here] for each in theirs)), threshold))
    if not total:
        return float("nan")
    correct = torch.cat(right)[torch.cat(scores).argsort(descending=True, stable=True)].double()
    counts = correct.cumsum(0)
    precision = counts / torch.arange(1, len(counts) + 1)
    # The best precision at this recall or a higher one: each hit adds 1 / total to the recall.
    envelope = precision.flip(0).cummax(0).values.flip(0)
    return float((envelope * correct).sum() / total)


def mean_average_precision(
    found: Sequence[Boxes], truth: Sequence[Boxes], thresholds: Sequence[float] = (0.5,)
) -> float:
    """The mean over the classes that there are, and over thresholds of the overlap that counts as found.

    Args:
        found: the boxes that a detector gives for each picture, the unsure ones too.
        truth: those that are there.
        thresholds: intersection over union; COCO takes 0.5, 0.55, … 0.95.
    """
    kinds = sorted({int(kind) for boxes in truth for kind in boxes.kinds})
    values = [average_precision(found, truth, kind, threshold) for kind in kinds for threshold in thresholds]
    return sum(values) / len(values)
