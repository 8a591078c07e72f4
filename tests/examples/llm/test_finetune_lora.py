"""The example that fine-tunes LoRA on an FP8 base learns as much as on the bf16 base, in one process and in two."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[3] / "examples" / "llm"))

import finetune_lora
from finetune_lora import main

SMALL = ["--steps", "2", "--batch-size", "2", "--length", "32", "--heldout-windows", "4", "--rank", "2"]
LOSS = re.compile(r"(\w+) base: +loss ([\d.]+) -> ([\d.]+)")


def test_it_trains_saves_and_merges_an_adapter(capsys, tmp_path):
    main([*SMALL, "--gradient-checkpointing", "--accumulate", "2", "--output", str(tmp_path)])
    out = capsys.readouterr().out
    ((base, before, after),) = LOSS.findall(out)
    assert base == "FP8" and float(after) < float(before)
    assert re.search(r"merged into 28 layers: weights off by \d\.\d % at most", out)
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()
    assert (tmp_path / "merged" / "model.safetensors").exists()


@pytest.mark.slow
def test_two_processes_train_it_with_gloo(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1"}
    run = subprocess.run(
        [*command, finetune_lora.__file__, *SMALL, "--output", str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    ((_, before, after),) = LOSS.findall(run.stdout)
    assert float(after) < float(before) and run.stdout.count("merged into 28 layers") == 1


@pytest.mark.slow
def test_an_fp8_base_learns_what_the_bf16_base_learns(capsys, tmp_path):
    options = ["--steps", "90", "--rank", "16", "--learning-rate", "8e-3", "--heldout-windows", "24", "--length", "96"]
    main([*options, "--compare", "--output", str(tmp_path)])
    found = {base: (float(before), float(after)) for base, before, after in LOSS.findall(capsys.readouterr().out)}
    drops = {base: before - after for base, (before, after) in found.items()}
    assert drops["bf16"] > 0.2 * found["bf16"][0]
    assert abs(drops["FP8"] - drops["bf16"]) < 0.05 * drops["bf16"]
