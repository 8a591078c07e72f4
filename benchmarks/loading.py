"""How long it takes to import the package, and to load a bfloat16 checkpoint into FP8.

    python -m benchmarks.loading

Loading is held against reading the file's pages, then casting them: that is done tensor by tensor with the operators
for casts, in turns with `from_pretrained`. It is a loader of two passes that knows its scales; one that finds them on
the way, and casts what is still in a cache, can be faster. The file is in the page cache on both sides.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from safetensors import safe_open

from . import machine, models, timing
from .table import Row, report

WANTED_LOAD, WANTED_IMPORT = 1.3, 1.15
FULL_SCALE = 448.0
# `import transformers` alone imports next to nothing; whoever loads a model imports the rest a moment later.
BASES = {
    "torch and transformers": "import torch, transformers",
    "the same, ready to load a model": "import torch, transformers; from transformers import PreTrainedModel",
}


def read_and_cast(folder: Path, read: Callable[[torch.Tensor], object]) -> None:
    """What a loader has to do: touch every page, cast every matrix but the embeddings, keep the rest."""
    from optimum_fp8 import ops

    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (safe_open is no dict)
                tensor = tensors.get_tensor(name)
                read(tensor)
                if tensor.ndim == 2 and "embed" not in name:
                    scale = torch.full((tensor.shape[0], 1), 2.0**-10)
                    ops.cast_to_fp8(tensor, scale, torch.float8_e4m3fn, FULL_SCALE)
                else:
                    tensor.clone()


def import_seconds(statements: str) -> float:
    """How long a fresh process takes for import statements, itself not counted."""
    script = f"import time; start = time.perf_counter(); {statements}; print(time.perf_counter() - start)"
    answer = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return float(answer.stdout.split()[-1])


def measure_load(scale_method: str, rounds: int) -> Row:
    folder = models.llama()
    read, _ = machine.reader()
    times = timing.interleave(
        {
            "load": lambda: models.load(folder, scale_method),
            "floor": lambda: read_and_cast(folder, read),
            "bf16": lambda: models.load(folder),
        },
        least=rounds,
        most=rounds,
    )
    load, floor, plain = (timing.median(times[name]) for name in ("load", "floor", "bf16"))
    return Row(
        f"load and quantize, {scale_method}",
        f"{load:.2f} s",
        f"read and cast {floor:.2f} s; from_pretrained in bf16 {plain:.2f} s",
        timing.ratio(times["load"], times["floor"]),
        WANTED_LOAD,
        at_most=True,
    )


def measure_import(base: str, rounds: int) -> Row:
    sides = {"with": f"{BASES[base]}; import optimum_fp8", "without": BASES[base]}
    times = timing.interleave(
        {name: partial(import_seconds, statements) for name, statements in sides.items()},
        least=rounds,
        most=rounds,
        measure=timing.told,
    )
    ours, plain = timing.median(times["with"]), timing.median(times["without"])
    return Row(
        f"import optimum_fp8 besides {base}",
        f"{ours:.2f} s",
        f"without {plain:.2f} s",
        timing.ratio(times["with"], times["without"]),
        WANTED_IMPORT,
        at_most=True,
    )


def run(scale_method: str = models.SCALES_PER_CHANNEL, rounds: int = 5) -> tuple[list[Row], list[str]]:
    """The rows of the table, and what to know about them."""
    methods = dict.fromkeys((scale_method, models.SCALES_PER_TENSOR))
    imports = [measure_import(base, rounds) for base in BASES]
    return [*imports, *(measure_load(method, rounds) for method in methods)], []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale-method", default=models.SCALES_PER_CHANNEL)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    machine.prepare()
    found, notes = run(options.scale_method, options.rounds)
    print(report(found, machine.describe(), notes))


if __name__ == "__main__":
    main()
