"""Processes that are killed in the middle of their work, at random points."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Sequence
from multiprocessing import get_context

from fresh import LIMIT, Interpreter
from tqdm import tqdm

POINTS = 20


def kill_at_random_points(act: Callable[[int], object], check: Callable[[int], None], *, points: int = POINTS) -> None:
    """Run `act(n)` in processes that are killed (-9) after a part of the time it takes, and then `check(n)` here.

    Twice, with numbers from `points` on, it runs to its end first, to find how long it takes. The processes are forks
    of this one, which has what they need; what loads a model by threads needs `kill_scripts_at_random_points`.
    """
    fork = get_context("fork")  # which has what this process has imported and made

    def alone(number: int) -> None:
        own, classes = threading.RLock(), [tqdm]  # theirs is one of all processes, which a killed one would keep
        for each in classes:
            classes += each.__subclasses__()
            each.set_lock(own)
        act(number)

    def process(number: int, seconds: float | None) -> float:
        began = time.monotonic()
        running = fork.Process(target=alone, args=(number,))
        running.start()
        running.join(LIMIT if seconds is None else seconds)
        hangs = seconds is None and running.is_alive()
        if seconds is not None or hangs:
            running.kill()
        running.join()
        assert not hangs, f"not done in {LIMIT} s"
        assert seconds is not None or running.exitcode == 0
        return began

    _at_random_points(process, check, points)


def kill_scripts_at_random_points(
    interpreter: Interpreter,
    script: str,
    arguments: Callable[[int], Sequence[object]],
    check: Callable[[int], None],
    *,
    points: int = POINTS,
) -> None:
    """The same for a script with `arguments(n)` in `sys.argv[1:]`, in forks of a process that never had threads.

    It prints the time (`time.monotonic()`) from which on it may be killed.
    """

    def process(number: int, seconds: float | None) -> float:
        done = interpreter.try_to_run(script, *map(str, arguments(number)), killed_after=seconds)
        assert done.returncode == 0 or seconds is not None, done.stdout + done.stderr
        return float(done.stdout) if seconds is None else 0.0

    _at_random_points(process, check, points)


def _at_random_points(process: Callable[[int, float | None], float], check: Callable[[int], None], points: int) -> None:
    """`process(n, seconds)` ends one's work after so many seconds; None: it is done then, and says when it began."""
    generator, seconds = random.Random(0), LIMIT * 1.0
    for number in (points, points + 1):  # either may be held up, and then all would be killed when they are done
        began = process(number, None)
        seconds = min(seconds, time.monotonic() - began)
    for number in range(points):
        process(number, generator.uniform(0, seconds))
        check(number)
