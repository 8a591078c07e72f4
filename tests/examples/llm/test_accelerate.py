"""`accelerate launch` with the configurations of Gaudis, as far as it goes on a machine without one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[3]
CONFIGS = ROOT / "examples" / "llm" / "accelerate"
SAYS_ITS_ENVIRONMENT = """
import json, os, sys
names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "ACCELERATE_MIXED_PRECISION")
rank = os.environ.get("RANK", "0")
with open(f"{sys.argv[1]}/{rank}.json", "w") as file:
    json.dump({name: os.environ.get(name) for name in names}, file)
"""


def launched(
    config: str, script: Path, *arguments: object, options: tuple[str, ...] = ()
) -> subprocess.CompletedProcess:
    program = Path(sys.executable).parent / "accelerate"
    command = [program, "launch", "--config_file", CONFIGS / config, "--main_process_port", "0", *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    words = [*map(str, command), str(script), *map(str, arguments)]
    return subprocess.run(words, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
@pytest.mark.parametrize(("config", "count"), [("hpu.yaml", 1), ("multi_hpu.yaml", 8)])
def test_a_process_for_each_card_knows_its_place(config, count, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SAYS_ITS_ENVIRONMENT)
    done = launched(config, script, tmp_path)
    assert done.returncode == 0, done.stderr
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(count)]
    assert len(list(tmp_path.glob("*.json"))) == count
    assert all(each["ACCELERATE_MIXED_PRECISION"] == "no" for each in found), "the model's own dtype stays"
    if count > 1:
        assert [each["RANK"] for each in found] == [each["LOCAL_RANK"] for each in found] == [*map(str, range(count))]
        assert all(each["WORLD_SIZE"] == each["LOCAL_WORLD_SIZE"] == str(count) for each in found)
        assert all(each["MASTER_ADDR"] == "127.0.0.1" for each in found)


@pytest.mark.slow
def test_the_configuration_of_several_cards_calibrates_on_cpus(tmp_path):
    few, found = ("--samples", "3", "--length", "32"), []
    for count in ("1", "2"):
        folder = tmp_path / count
        options = ("--num_processes", count)
        where = ("--ranges", folder / "ranges", "--output", folder / "checkpoint")
        config = "hpu.yaml" if count == "1" else "multi_hpu.yaml"
        done = launched(config, ROOT / "examples" / "llm" / "calibrate.py", *few, *where, options=options)
        assert done.returncode == 0, done.stderr
        found.append((folder / "ranges_measurements.safetensors").read_bytes())
    assert found[0] == found[1]


def launcher(*arguments: str):
    """What `accelerate launch` makes of its arguments before it starts anything."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser

    parsed = launch_command_parser().parse_args(["--config_file", *arguments, "script.py"])
    return _validate_launch_command(parsed)[0]


def test_cards_can_be_chosen(monkeypatch):
    from accelerate.utils import launch

    monkeypatch.setattr(launch, "is_hpu_available", lambda: True)
    found = launcher(str(CONFIGS / "multi_hpu.yaml"), "--gpu_ids", "0,1,2,3", "--num_processes", "4")
    assert found.multi_gpu and not found.use_cpu
    environment = launch.prepare_multi_gpu_env(found)
    assert environment["HABANA_VISIBLE_MODULES"] == "0,1,2,3" and found.nproc_per_node == "4"


@pytest.mark.parametrize(("rank", "expected"), [(None, ("NO", None)), ("3", ("MULTI_HPU", "hccl"))])
def test_a_process_on_a_gaudi_speaks_over_hccl(rank, expected, monkeypatch):
    from accelerate import PartialState, state

    monkeypatch.setattr(state, "is_hpu_available", lambda init_hccl=False: True)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("LOCAL_RANK", rank)
    process = PartialState.__new__(PartialState)
    backend, kind = process._prepare_backend()
    assert (kind.value, backend) == expected
    assert process.default_device == torch.device("hpu")
