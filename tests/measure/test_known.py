"""Ranges out of a checkpoint: what was asked of measurements is what they know, as JSON too."""

from __future__ import annotations

import json

import pytest
import torch

from optimum_fp8.errors import FP8MeasurementError
from optimum_fp8.formats import TARGETS, number_format
from optimum_fp8.measure import AskedRanges, KnownRange, Measurements, Purpose


def purpose(target: str) -> Purpose:
    return Purpose(number_format("E4M3", target), lambda ranges: ranges / 448)


@pytest.mark.parametrize(
    "known, plain",
    [
        (KnownRange(dict.fromkeys(TARGETS, 2.5)), 2.5),
        (KnownRange({"gaudi2": 1.0, "gaudi3": 2.0}), {"range": {"gaudi2": 1.0, "gaudi3": 2.0}}),
        (KnownRange(dict.fromkeys(TARGETS, 2.0), largest=3.0), {"range": 2.0, "largest": 3.0}),
        (KnownRange({}, largest=1.0), {"largest": 1.0}),
        (KnownRange({}, per_head=[1.0, 0.0]), {"per_head": [1.0, 0.0]}),
    ],
)
def test_as_json_and_back(known, plain):
    assert known.plain() == plain
    again = KnownRange.from_plain(json.loads(json.dumps(plain)), TARGETS)
    assert again.plain() == plain
    for target in TARGETS:
        assert torch.equal(again.range_for(purpose(target)), known.range_for(purpose(target)))
    assert torch.equal(again.largest(), known.largest()) and again.range().isfinite()


@pytest.mark.parametrize("said", [-1.0, float("nan"), float("inf"), "1", [1.0], {}, {"peak": 1.0}, {"range": [1.0]}])
def test_what_is_no_range(said):
    with pytest.raises((ValueError, TypeError, AttributeError)):
        KnownRange.from_plain(said, TARGETS)


@pytest.mark.parametrize("observer", ["maxabs", "mse", "percentile"])
def test_what_was_asked_is_known_and_nothing_else(observer):
    measured = Measurements("", observer=observer)
    generator = torch.Generator().manual_seed(0)
    for kind in ("q", "k", "v"):
        measured.observe("m", kind, torch.randn(64, 4, 8, generator=generator), per_head=True)
    view = measured.at("m")
    asked = AskedRanges(measured, "m", view.kinds)
    for target in TARGETS:
        asked.of("q", purpose(target))
    asked.largest("k")
    asked.per_head("v")
    known = Measurements("", {("m", kind): value for kind, value in asked.known.items()}).at("m")
    assert known.kinds == {"q", "k", "v"}
    for target in TARGETS:
        assert torch.equal(known.of("q", purpose(target)), view.of("q", purpose(target)))
    assert torch.equal(known.largest("k"), view.largest("k"))
    assert torch.equal(known.per_head("v"), view.per_head("v"))


def test_nothing_can_be_measured_with_it():
    with pytest.raises(FP8MeasurementError, match="read from a checkpoint"):
        KnownRange({}, largest=1.0).update(torch.ones(3))
