"""Everything, in one table, which is also written to `benchmarks/results/NAME.md`.

    python -m benchmarks [--only linear casts conv attention experts generate memory loading overhead calibrate]
                         [--compile] [--samples N] [--name NAME]

Needs the extra `benchmark` (`pip install -e '.[benchmark]'`), about 6 GB of memory, and a quiet machine: the load
before and after goes into the page.
"""

from __future__ import annotations

import argparse
import datetime
import os
import time
from collections.abc import Callable
from pathlib import Path

from . import (
    attention,
    calibrate,
    conv,
    cpu_casts,
    cpu_linear,
    experts,
    generate,
    loading,
    machine,
    memory,
    overhead,
    table,
)

Part = Callable[[argparse.Namespace], tuple[list[table.Row], list[str]]]

PARTS: dict[str, Part] = {
    "linear": lambda options: cpu_linear.run(budget=options.budget, static=options.static),
    "casts": lambda options: cpu_casts.run(budget=options.budget),
    "conv": lambda options: conv.run(options.budget, options.single_thread),
    "attention": lambda options: attention.run(budget=options.budget),
    "experts": lambda options: experts.run(
        budget=4 * options.budget, library=options.vllm, single_thread=options.single_thread
    ),
    "generate": lambda options: generate.run(options.scale_method, options.rivals),
    "memory": lambda options: memory.run(options.scale_method),
    "loading": lambda options: loading.run(options.scale_method),
    "overhead": lambda options: overhead.run(),
    "calibrate": lambda options: calibrate.run(options.samples),
}


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    found.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    found.add_argument("--compile", action="store_true", help="generate under torch.compile too")
    found.add_argument("--static", action="store_true", help="linear layers with FP8 activations too")
    found.add_argument(
        "--single-thread", action="store_true", help="convolutions and experts by the CPU time of one thread"
    )
    found.add_argument("--vllm", metavar="LIBRARY", help="vLLM's library for CPUs, whose experts are measured too")
    found.add_argument("--rivals", nargs="*", default=generate.RIVALS, choices=generate.RIVALS)
    found.add_argument("--scale-method", default=generate.models.SCALES_PER_CHANNEL)
    found.add_argument(
        "--budget", type=float, default=1.5, help="seconds for each linear layer, cast, attention; experts: four times"
    )
    found.add_argument("--samples", type=int, default=8, help="of 512 tokens, for calibration")
    found.add_argument("--name", default=datetime.date.today().isoformat(), help="of the page in benchmarks/results")
    return found


def load_average() -> str:
    return f"{os.getloadavg()[0]:.2f}"


def main() -> None:
    options = parser().parse_args()
    machine.prepare()
    described = {**machine.describe(), "load before": load_average()}
    rows: list[table.Row] = []
    notes: list[str] = []
    for name in options.only:
        start = time.perf_counter()
        found, said = PARTS[name](options)
        print(f"{name}: {time.perf_counter() - start:.0f} s", flush=True)
        rows, notes = rows + found, notes + said
    if options.compile:
        found, said = generate.run(options.scale_method, options.rivals, compiled=True)
        rows, notes = rows + found, notes + [f"compiled: {note}" for note in said]
    described["load after"] = load_average()
    print(table.report(rows, described, notes))
    path = Path(__file__).parent / "results" / f"{options.name}.md"
    table.write(path, table.markdown(rows, described, f"FP8 on a CPU, {options.name}", notes))
    print(f"written to {path}")


if __name__ == "__main__":
    main()
