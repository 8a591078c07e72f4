"""Running rows in processes of their own: a crash, or a pair that never ends, costs a row and no more.

Processes are forked from one that has imported everything, which importing takes longer than most rows.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .pairs import Pair, pairs

CPU_S, LIMIT_S = 120, 600  # for one pair, of the processor's time and by the clock


def read(path: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """The rows of a file, by architecture and class; the last of each counts."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        row = json.loads(line)
        rows[row["model_type"], row["class_name"]] = row
    return rows


def run(
    chosen: Sequence[Pair], path: Path, *, jobs: int = 1, again: bool = False, seconds: float = float("inf")
) -> None:
    """Run the pairs that the file does not hold, and append their rows to it as they finish."""
    from . import flow  # imports transformers and the package, once, before processes are forked

    done = {key for key, row in read(path).items() if not (again and row["status"] != "pass")}
    waiting = [pair for pair in chosen if (pair.model_type, pair.class_name) not in done]
    running: dict[int, tuple[Pair, float]] = {}
    if waiting:
        flow.census_row(next(pair for pair in pairs() if pair.class_name == "LlamaForCausalLM"))  # imports the rest
    start, total = time.monotonic(), len(waiting)
    path.parent.mkdir(parents=True, exist_ok=True)
    while waiting or running:
        while waiting and len(running) < jobs and time.monotonic() - start < seconds:
            pair = waiting.pop(0)
            running[_forked(pair, path, flow.census_row)] = (pair, time.monotonic())
        if not running:
            return
        _reap(running, path, total - len(waiting), total)


def _forked(pair: Pair, path: Path, make: Any) -> int:
    child = os.fork()
    if child:
        return child
    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 1)
    os.dup2(silent, 2)
    signal.signal(signal.SIGXCPU, _too_slow)
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_S, 2 * CPU_S))
    try:
        _append(path, make(pair))
    finally:
        os._exit(0)


def _too_slow(*_: Any) -> None:
    from .flow import TooSlow

    raise TooSlow(f"more than {CPU_S} s of the processor's time")


def _append(path: Path, row: dict[str, Any]) -> None:
    line = json.dumps(row, default=str) + "\n"
    with path.open("a") as file:
        file.write(line)


def _reap(running: dict[int, tuple[Pair, float]], path: Path, started: int, total: int) -> None:
    """Wait a moment for one of the processes; end those that take too long, and give those that ended badly a row."""
    for child, (pair, since) in list(running.items()):
        finished, status = os.waitpid(child, os.WNOHANG)
        if not finished and time.monotonic() - since > LIMIT_S:
            os.kill(child, signal.SIGKILL)
            finished, status = os.waitpid(child, 0)
        if finished:
            del running[child]
            row = read(path).get((pair.model_type, pair.class_name))
            if status or row is None:
                cause = f"the process ended with {status} after {time.monotonic() - since:.0f} s"
                _append(path, {**pair._asdict(), "status": "fail", "stage": "process", "cause": cause})
                row = {"status": "fail", "stage": "process"}
            print(f"{started}/{total} {pair.class_name}: {row['status']} {row.get('stage', '')}", flush=True)
            return
    time.sleep(0.02)
