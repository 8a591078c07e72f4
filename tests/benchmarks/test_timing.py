"""Sides run in turns, ratios are taken within a round, and copies come back as late as possible."""

from __future__ import annotations

import itertools

import pytest

from benchmarks import timing


def test_rounds_alternate_their_order():
    turns = timing.rounds("abc")
    assert ["".join(next(turns)) for _ in range(4)] == ["abc", "cba", "abc", "cba"]


def test_interleave_calls_in_turns_and_counts_no_warmup():
    called: list[str] = []
    sides = {name: (lambda name=name: called.append(name)) for name in "ab"}
    times = timing.interleave(sides, budget=0, least=3, warmup=1)
    assert "".join(called) == "abbaabba"
    assert {name: len(values) for name, values in times.items()} == {"a": 3, "b": 3}


def test_interleave_keeps_what_is_measured_in_the_order_of_rounds():
    numbers = {"a": itertools.count(0), "b": itertools.count(100)}
    sides = {name: (lambda values=values: next(values)) for name, values in numbers.items()}
    times = timing.interleave(sides, least=2, most=2, measure=lambda run: run())
    assert times == {"a": [1, 2], "b": [101, 102]}


@pytest.mark.parametrize("budget, least, most, calls", [(0.0, 2, 9, 2), (60.0, 2, 4, 4)])
def test_interleave_ends_by_its_budget_and_its_bounds(budget, least, most, calls):
    times = timing.interleave({"a": lambda: None}, budget=budget, least=least, most=most)
    assert len(times["a"]) == calls


@pytest.mark.parametrize("least, most", [(0, 3), (4, 3)])
def test_interleave_refuses_impossible_bounds(least, most):
    with pytest.raises(ValueError, match=f"least={least} and most={most}"):
        timing.interleave({"a": lambda: None}, least=least, most=most)


def test_seconds_of_a_call(monkeypatch):
    clock = iter([10.0, 12.5])
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(clock))
    assert timing.seconds(lambda: None) == 2.5


def test_seconds_of_a_call_leave_out_freeing_its_result(monkeypatch):
    events = []

    class Result:
        def __del__(self):
            events.append("freed")

    def clock():
        events.append("clock")
        return 0.0

    monkeypatch.setattr(timing.time, "perf_counter", clock)
    timing.seconds(Result)
    assert events == ["clock", "clock", "freed"]


def test_median_is_the_middle():
    assert timing.median([3.0, 100.0, 1.0]) == 3


def test_ratio_is_taken_within_each_round():
    """A machine that slows down fourfold in the middle changes both sides of a round, and no ratio."""
    slow, fast = [2.0, 2.0, 8.0, 8.0, 8.0], [1.0, 1.0, 4.0, 4.0, 4.0]
    assert timing.ratio(slow, fast) == 2
    assert timing.ratio([2.0, 2.0, 90.0], [1.0, 1.0, 1.0]) == 2  # and one disturbed call changes nothing
    with pytest.raises(ValueError):
        timing.ratio([1.0, 2.0], [1.0])


def test_rotation_takes_every_copy_before_any_again():
    rotation = timing.Rotation("abc")
    assert "".join(rotation.take() for _ in range(7)) == "abcabca"
    with pytest.raises(ValueError, match="at least one"):
        timing.Rotation([])
