"""A calibration that is killed, at any moment, again and again, ends with the bytes of one that was left alone."""

from __future__ import annotations

import pytest
import torch
from fresh import TRANSFORMERS
from tiny_models import tiny_llama

KILLS = 20

SCRIPT = """
import os, random, signal, sys, time
from pathlib import Path
import torch
from transformers import AutoModelForCausalLM
from optimum_fp8 import FP8Config
from optimum_fp8.calibration import resume

class Slowly(list):
    # so that there are moments to be killed at
    def __iter__(self):
        for batch in super().__iter__():
            time.sleep(0.01)
            yield batch

ids = [torch.randint(3, 64, (1, 16), generator=torch.Generator().manual_seed(n)) for n in range(40)]
batches = Slowly({"input_ids": each} for each in ids)

def run(folder):
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        resume.INTERVAL, resume._LITTLE = 0.02, 1.0
        config = FP8Config(mode="MEASURE", dataset=batches, dump_stats_path=f"{folder}/ranges")
        AutoModelForCausalLM.from_pretrained("llama", quantization_config=config)
        status = 0
    finally:
        os._exit(status)

def finished(folder):
    return (Path(folder) / "ranges_measurements.safetensors").read_bytes()

began = time.monotonic()
assert os.waitpid(run("alone"), 0)[1] == 0
took, expected = time.monotonic() - began, finished("alone")
chance, killed, partial = random.Random(0), 0, 0
while killed < int(sys.argv[1]):
    child = run("killed")
    time.sleep(chance.uniform(0, took))
    os.kill(child, signal.SIGKILL)
    if os.WIFSIGNALED(os.waitpid(child, 0)[1]):
        killed += 1
        left = (Path("killed") / "ranges_partial.safetensors").exists()
        partial += left
        took *= 1 if left else 1.1  # a machine under load takes longer than it did alone
    else:  # it was done before
        took *= 0.9
        assert finished("killed") == expected
        os.unlink("killed/ranges_measurements.safetensors")
assert partial > killed / 4, partial
assert os.waitpid(run("killed"), 0)[1] == 0
assert finished("killed") == expected
left = [name for name in os.listdir("killed") if not name.startswith(".measurements-")]
assert left == ["ranges_measurements.safetensors"], left
print("killed", killed)
"""


@pytest.mark.slow
def test_killed_at_random_moments(tmp_path):
    torch.manual_seed(0)
    tiny_llama().save_pretrained(tmp_path / "llama")
    assert f"killed {KILLS}" in TRANSFORMERS.run(SCRIPT, str(KILLS), folder=tmp_path)
