"""Everything, in one table, which is also written to `benchmarks/results/NAME.md`.

    python -m benchmarks [--only linear casts conv attention experts generate memory loading overhead calibrate]
                         [--compile] [--vllm LIBRARY] [--samples N] [--name NAME]

Needs the extra `benchmark` (`pip install -e '.[benchmark]'`), about 6 GB of memory, and a quiet machine: the load
before and after goes into the page. That is written after each part. A rival that cannot run is a row that tells why,
and so is a part of ours that raises: then the others go on, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import datetime
import os
import sys
from collections.abc import Callable
from functools import partial
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
)
from .page import Measured, Page

PARTS: dict[str, Callable[[argparse.Namespace], Measured]] = {
    "linear": lambda options: cpu_linear.run(
        budget=options.budget, static=options.static, single_thread=options.single_thread, library=options.vllm
    ),
    "casts": lambda options: cpu_casts.run(budget=options.budget),
    "conv": lambda options: conv.run(options.budget, options.single_thread),
    "attention": lambda options: attention.run(
        budget=options.budget, library=options.vllm, single_thread=options.single_thread
    ),
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
        "--single-thread",
        action="store_true",
        help="linear layers, convolutions, attention, experts by one thread's CPU time",
    )
    found.add_argument("--vllm", metavar="LIBRARY", help="vLLM's library for CPUs, to measure it too: see vllm_cpu.py")
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


def prepared(part: Callable[[argparse.Namespace], Measured], options: argparse.Namespace) -> Measured:
    """A part, on as many threads as all have, whatever the part before left behind when it raised."""
    machine.prepare()
    return part(options)


def main() -> int:
    options = parser().parse_args()
    machine.prepare()
    wanted = {name: PARTS[name] for name in options.only}
    if options.compile:
        wanted["compiled"] = lambda options: generate.run(options.scale_method, options.rivals, compiled=True)
    parts = {name: partial(prepared, part, options) for name, part in wanted.items()}
    path = Path(__file__).parent / "results" / f"{options.name}.md"
    described = {**machine.describe(), "load before": load_average()}
    page = Page(path, f"FP8 on a CPU, {options.name}", described)
    page.run(parts, after=lambda: {"load after": load_average()})
    print(page)
    print(f"written to {path}")
    return int(bool(page.failed))


if __name__ == "__main__":
    sys.exit(main())
