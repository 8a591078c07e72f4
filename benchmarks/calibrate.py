"""What observing costs, and the whole of calibration, beside plain forward passes over the same samples.

    python -m benchmarks.calibrate [--samples 8] [--length 512] [--rounds 5] [--operators]

The models share their weights, and each is given the same tokens. "observe" is a forward pass of a prepared model,
"calibrate" is `optimum_fp8.calibrate`: the data, the progress bar, and the fingerprints of data and weights as well.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from . import machine, models, timing
from .table import Row, report

WANTED_OBSERVE = {"maxabs": 1.05, "mse": 1.10}  # percentile and entropy observe as mse does
WANTED_CALIBRATE = 1.10


def rows_of(samples: int, length: int, vocabulary: int) -> list[dict[str, list[int]]]:
    """A dataset of random tokens."""
    return [{"input_ids": row} for row in models.prompt(samples, length, vocabulary).tolist()]


def prepared(model: Any, observer: str, rows: list[dict[str, list[int]]]) -> Any:
    """A model that shares the weights of `model`, and is measured."""
    from optimum_fp8 import FP8Config, prepare

    twin = copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
    # Where no calibration that was broken off has left anything to go on from.
    stats = f"{tempfile.mkdtemp(prefix='calibrate-')}/measure"
    options = {"dataset": rows, "max_seq_length": len(rows[0]["input_ids"]), "dump_stats_path": stats}
    return prepare(twin, FP8Config(observer=observer, **options))


@torch.no_grad()
def forward(model: Any, batches: list[torch.Tensor]) -> None:
    """One pass for each sample, as calibration makes it."""
    for batch in batches:
        model(input_ids=batch)


def sides_of(model: Any, rows: list[dict[str, list[int]]]) -> dict[str, Callable[[], object]]:
    """What is timed, by name."""
    from optimum_fp8 import calibrate

    batches = [torch.tensor([row["input_ids"]]) for row in rows]
    sides: dict[str, Callable[[], object]] = {"forward": partial(forward, model, batches)}
    for observer in WANTED_OBSERVE:
        twin = prepared(model, observer, rows)
        sides[f"observe {observer}"] = partial(forward, twin, batches)
        sides[f"calibrate {observer}"] = partial(calibrate, twin)
    return sides


def run(samples: int = 8, length: int = 512, rounds: int = 5) -> tuple[list[Row], list[str]]:
    """The rows of the table, and what to know about them."""
    model = models.load(models.llama())
    sides = sides_of(model, rows_of(samples, length, model.config.vocab_size))
    times = timing.interleave(sides, least=rounds, most=rounds)
    plain = timing.median(times["forward"])
    found = []
    for name in list(sides)[1:]:
        what, observer = name.split()
        found.append(
            Row(
                f"{what} with {observer}, {samples} samples of {length} tokens",
                f"{timing.median(times[name]):.2f} s",
                f"forward passes {plain:.2f} s",
                timing.ratio(times[name], times["forward"]),
                WANTED_OBSERVE[observer] if what == "observe" else WANTED_CALIBRATE,
                at_most=True,
            )
        )
    return found, []


def operators(observer: str, samples: int, length: int, count: int = 24) -> str:
    """torch's operators in one calibration, by their own time, and how much of it they leave to Python."""
    from torch.profiler import ProfilerActivity, profile

    model = models.load(models.llama())
    calibration = sides_of(model, rows_of(samples, length, model.config.vocab_size))[f"calibrate {observer}"]
    calibration()
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        calibration()
    return str(recorded.key_averages().table(sort_by="self_cpu_time_total", row_limit=count, max_name_column_width=48))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--operators", action="store_true", help="also list torch's operators by their own time")
    options = parser.parse_args()
    machine.prepare()
    found, notes = run(options.samples, options.length, options.rounds)
    print(report(found, machine.describe(), notes))
    if options.operators:
        print(operators("mse", options.samples, options.length))


if __name__ == "__main__":
    main()
