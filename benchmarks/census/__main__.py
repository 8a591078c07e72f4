"""The census: build, quantize, run, save, reload and dequantize every architecture under every auto class.

    python -m benchmarks.census [--only bert gpt2] [--auto-class CAUSAL_LM] [--first] [--jobs N] [--resume FILE]

Rows are appended to FILE (JSON lines) as they finish; those that are there already are not run again, but with
`--again` those that did not pass. `--table` makes benchmarks/results/census.md of them.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

from . import processes, table
from .pairs import mappings, pairs

RESULTS = Path(__file__).parents[1] / "results"


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        prog="python -m benchmarks.census", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    found.add_argument("--only", nargs="+", metavar="TYPE", help="these architectures, by model type")
    found.add_argument("--auto-class", choices=sorted(mappings()), help="the classes of this auto class")
    found.add_argument("--first", action="store_true", help="of each architecture the most telling class alone")
    found.add_argument("--jobs", type=int, default=1, help="processes at a time")
    found.add_argument("--resume", type=Path, default=RESULTS / "census.jsonl", help="file of rows to go on with")
    found.add_argument("--again", action="store_true", help="run those that did not pass again")
    found.add_argument("--table", action="store_true", help="run nothing, make the table of the rows")
    found.add_argument("--seconds", type=float, default=float("inf"), help="start nothing new after this time")
    return found


def main() -> None:
    options = parser().parse_args()
    if options.table:
        rows = list(processes.read(options.resume).values())
        table.write_rows(rows, RESULTS / "census.jsonl")
        (RESULTS / "census.md").write_text(table.markdown(rows, pairs()))
        print(table.sentence(rows, pairs()))
        return
    chosen = [
        pair
        for pair in pairs()
        if (not options.only or pair.model_type in options.only)
        and (not options.auto_class or options.auto_class in pair.autos)
    ]
    if options.first:
        chosen = list({pair.model_type: pair for pair in reversed(chosen)}.values())
        random.Random(0).shuffle(chosen)  # so that a part of them is a fair sample
    processes.run(chosen, options.resume, jobs=options.jobs, again=options.again, seconds=options.seconds)


if __name__ == "__main__":
    main()
