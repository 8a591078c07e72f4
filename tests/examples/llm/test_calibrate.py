"""The example of calibration in many processes: the commands of the documentation, and what they write."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[3]
CONFIGS = sorted((ROOT / "examples" / "llm" / "accelerate").glob("*.yaml"))
FEW = ("--samples", "3", "--length", "32")


def commands() -> list[str]:
    """The commands of the page that starts several processes."""
    page = (ROOT / "docs" / "many-processes.md").read_text(encoding="utf-8")
    return [line for block in re.findall(r"^```sh\n(.*?)^```$", page, re.M | re.S) for line in block.splitlines()]


def run(command: str, folder: Path, *more: str) -> bytes:
    """The measurements and the tensors of the checkpoint that a command writes."""
    program, *arguments = shlex.split(command)
    paths = [f"{ROOT}/{word}" if word.startswith("examples/") else word for word in arguments]
    whole = [str(Path(sys.executable).parent / program), *paths, *more]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(whole, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "checkpoint: fp8/checkpoint" in done.stdout
    checkpoint = (folder / "fp8" / "checkpoint" / "model.safetensors").read_bytes()
    tensors = checkpoint[8 + int.from_bytes(checkpoint[:8], "little") :]
    return (folder / "fp8" / "ranges_measurements.safetensors").read_bytes() + tensors


@pytest.mark.slow
def test_the_commands_of_the_documentation_give_the_bytes_of_one_process(tmp_path):
    ways = ["python examples/llm/calibrate.py", *commands()]
    ways.append(f"{commands()[0]} --fsdp")
    assert [way.split()[0] for way in ways] == ["python", "torchrun", "accelerate", "torchrun"]
    found = []
    for number, way in enumerate(ways):
        folder = tmp_path / str(number)
        folder.mkdir()
        found.append(run(way, folder, *FEW, "--progress-log", "log.jsonl"))
        log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        assert [line["event"] for line in log if line["event"] != "progress"] == ["start", "finished", "judged"], (
            "of one process"
        )
        assert log[-1]["batches"] == 3 == log[-1]["samples"]
    assert [each == found[0] for each in found] == [True] * 4


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_configurations_of_accelerate_are_read_and_say_how_to_use_them(path):
    from accelerate.commands.config.config_args import load_config_from_file

    text = path.read_text(encoding="utf-8")
    kinds = {"cpu": "MULTI_GPU", "fsdp2": "FSDP", "multi_gpu": "MULTI_GPU", "hpu": "NO", "multi_hpu": "MULTI_HPU"}
    kinds |= {"deepspeed_zero2": "DEEPSPEED"}
    config = load_config_from_file(str(path))
    assert config.distributed_type == kinds[path.stem] and (config.num_processes > 1) == (path.stem != "hpu")
    assert text.startswith(f"# accelerate launch --config_file examples/llm/accelerate/{path.name} examples/llm/")
    assert ("# Not run on " in text) == (path.stem != "cpu")
    if path.stem == "deepspeed_zero2":
        assert config.deepspeed_config["zero_stage"] == 2
    if path.stem == "fsdp2":
        assert yaml.safe_load(text)["fsdp_config"]["fsdp_version"] == 2
