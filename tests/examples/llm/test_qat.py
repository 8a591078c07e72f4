"""The example trains, in one process and in several, and prints what training saves."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[3] / "examples" / "llm" / "qat.py"
FEW = ("--steps", "2", "--batch-size", "1", "--length", "32", "--text", "text.txt", "--heldout", "text.txt")


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_few_steps(processes, tmp_path):
    (tmp_path / "text.txt").write_text("def add(a, b):\n    return a + b\n" * 40)
    program = [sys.executable]
    if processes > 1:
        program += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [*program, str(EXAMPLE), *FEW, "--output", "trained"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = [line for line in done.stdout.splitlines() if line.startswith(("trained in", "quantized"))]
    assert [row.split("  ")[0] for row in rows] == [
        "trained in bf16",
        "quantized afterwards",
        "trained in FP8",
        "trained in FP8, distilled",
    ]
    assert (tmp_path / "trained" / "model.safetensors").exists()


@pytest.mark.slow
def test_training_closes_most_of_the_gap(tmp_path):
    """The default in fewer and smaller steps: the model learns, quantizing it costs much, training saves most of it."""
    example = runpy.run_path(str(EXAMPLE))
    names = ("text", "heldout")
    for name, text in zip(names, example["code_of_models"](600_000, 40_000), strict=True):
        (tmp_path / name).write_text(text, encoding="utf-8")
    texts = [argument for name in names for argument in (f"--{name}", name)]
    few = ["--steps", "200", "--batch-size", "4", "--learning-rate", "1.5e-3", "--no-distill"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(EXAMPLE), *texts, *few]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines() if line.startswith(("before", "trained", "quantized"))]
    before, bf16, afterwards, in_fp8 = (next(float(part) for part in row if part[0].isdigit()) for row in rows)
    assert bf16 < before - 1.0 and afterwards - bf16 > 0.5
    assert afterwards - in_fp8 >= 0.8 * (afterwards - bf16)
