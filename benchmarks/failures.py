"""What cannot run here costs its own rows, not the run: why it cannot is kept, and told in their place."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Callable, Iterable
from typing import TypeVar

from .table import Row, not_run

Result = TypeVar("Result")

_LONGEST = 240  # characters of a reason
_OF_SIGNALS = {signal.SIGILL: "an instruction that this processor does not have", signal.SIGKILL: "out of memory, say"}


class Rivals:
    """Those of the sides of a comparison that may fail.

    Attributes:
        names: theirs.
        reasons: why those that failed did, by name. They take no more turns.
    """

    def __init__(self, names: Iterable[str]):
        self.names, self.reasons = tuple(names), dict[str, str]()

    def attempt(self, name: str, run: Callable[[], Result]) -> Result | None:
        """What `run` returns. Where it is a rival's and raises, or has done so before: None, and the reason is kept."""
        if name in self.reasons:
            return None
        try:
            return run()
        except Exception as error:
            if name not in self.names:
                raise
            self.reasons[name] = reason(error)
            return None

    def rows(self, what: str) -> list[Row]:
        """One for each rival that failed."""
        return [not_run(f"{what}, beside {name}", why) for name, why in self.reasons.items()]


def reason(error: BaseException) -> str:
    """The kind and the message of an error, in one line."""
    words = " ".join(str(error).split())
    named = words if isinstance(error, RuntimeError) and words else f"{type(error).__name__}: {words}"
    return named if len(named) <= _LONGEST else f"{named[:_LONGEST]}…"


def end_of(status: int, last_words: str = "") -> str:
    """How a process ended, from its exit status (negative: the signal) and what it wrote to its stderr."""
    if status < 0:
        number = signal.Signals(-status)
        means = f" ({_OF_SIGNALS[number]})" if number in _OF_SIGNALS else ""
        return f"was killed by {number.name}{means}"
    lines = last_words.strip().splitlines()
    return f"ended with status {status}" + (f": {lines[-1].strip()}" if lines else "")


def try_apart(what: str, command: list[str], folder: str | None = None) -> None:
    """Run in a process of its own what might end the process that runs it.

    Raises:
        RuntimeError: it did: tells `what`, and how.
    """
    done = subprocess.run(command, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{what} {end_of(done.returncode, done.stderr)}")
