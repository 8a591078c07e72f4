"""How things are timed: alternating, many times, by the median.

Two figures taken one after the other compare two moments of the machine; two figures taken in turns compare two
programs. So the sides of a comparison run round by round, each round in the opposite order of the last, and a ratio is
the median over the rounds of the ratios within each round.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Generic, TypeVar, cast

from .failures import Rivals

Side = TypeVar("Side")

Times = dict[str, list[float]]
Clock = Callable[[Callable[[], object]], float]


def rounds(sides: Sequence[Side]) -> Iterator[list[Side]]:
    """The sides in turns, for ever: forwards, backwards, forwards, …"""
    order = list(sides)
    while True:
        yield list(order)
        order.reverse()


def seconds(run: Callable[[], object]) -> float:
    """How long one call takes, without freeing what it returns (a model, say)."""
    start = time.perf_counter()
    result = run()
    taken = time.perf_counter() - start
    del result
    return taken


def seconds_of_thread(run: Callable[[], object]) -> float:
    """The CPU time of this thread in a call, which load disturbs less than its time."""
    start = time.thread_time()
    run()
    return time.thread_time() - start


def told(run: Callable[[], object]) -> float:
    """What a call returns, for sides that take their own time."""
    return cast(float, run())


def interleave(
    sides: Mapping[str, Callable[[], object]],
    *,
    budget: float = 2.0,
    least: int = 5,
    most: int = 60,
    warmup: int = 1,
    measure: Clock = seconds,
    rivals: Rivals | None = None,
) -> Times:
    """Run all sides in turns until the time is up; the value of each call, in the order of the rounds.

    Args:
        sides: name to what is timed.
        budget: seconds after which no new round begins, once there were `least`.
        least: rounds that are made in any case.
        most: rounds after which it ends in any case.
        warmup: rounds that are not counted.
        measure: what is kept of a call: by default its seconds.
        rivals: those of the sides that may fail; they are then in no later round, and not in the result.
    """
    if least < 1 or most < least:
        raise ValueError(f"least={least} and most={most}: expected 1 <= least <= most")
    rivals = rivals or Rivals(())
    turns = rounds(list(sides))
    for _ in range(warmup):
        for name in next(turns):
            rivals.attempt(name, sides[name])
    times: Times = {name: [] for name in sides}
    start = time.perf_counter()
    for done in range(most):
        if done >= least and time.perf_counter() - start > budget:
            break
        for name in next(turns):
            if (value := rivals.attempt(name, partial(measure, sides[name]))) is not None:
                times[name].append(value)
    return {name: values for name, values in times.items() if name not in rivals.reasons}


def median(values: Sequence[float]) -> float:
    """The middle value."""
    return statistics.median(values)


def ratio(numerators: Sequence[float], denominators: Sequence[float]) -> float:
    """The median of the ratios within each round."""
    return statistics.median(a / b for a, b in zip(numerators, denominators, strict=True))


class Rotation(Generic[Side]):
    """Takes one copy after another, so that by the time a copy comes back no cache still holds it."""

    def __init__(self, copies: Sequence[Side]):
        if not copies:
            raise ValueError("a rotation needs at least one copy")
        self._copies, self._next = copies, 0

    def take(self) -> Side:
        copy = self._copies[self._next]
        self._next = (self._next + 1) % len(self._copies)
        return copy
