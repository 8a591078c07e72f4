"""Processes that are killed in the middle of their work, at random points."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from multiprocessing import get_context

from tqdm import tqdm

POINTS = 20


def kill_at_random_points(act: Callable[[int], object], check: Callable[[int], None], *, points: int = POINTS) -> None:
    """Run `act(n)` in processes that are killed (-9) after a part of the time it takes, and then `check(n)` here.

    Twice, with numbers from `points` on, it runs to its end first, to find how long it takes.
    """
    fork = get_context("fork")  # which has what this process has imported and made

    def alone(number: int) -> None:
        own, classes = threading.RLock(), [tqdm]  # theirs is one of all processes, which a killed one would keep
        for each in classes:
            classes += each.__subclasses__()
            each.set_lock(own)
        act(number)

    def process(number: int) -> float:
        started = time.monotonic()
        running = fork.Process(target=alone, args=(number,))
        running.start()
        if number < points:
            running.join(generator.uniform(0, seconds))
            running.kill()
        running.join()
        assert number < points or running.exitcode == 0
        return time.monotonic() - started

    generator, seconds = random.Random(0), 0.0
    for number in (points, points + 1):  # the first takes longer
        seconds = process(number)
    for number in range(points):
        process(number)
        check(number)
