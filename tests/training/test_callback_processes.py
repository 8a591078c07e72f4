"""FP8Callback in several processes: all of them together find what one finds that sees all of the data."""

from __future__ import annotations

import json

import pytest
from ranks import run_ranks, succeed
from transformers import AutoModelForCausalLM

from optimum_fp8 import Measurements
from optimum_fp8.modules import fp8_modules

# accelerate takes FSDP only where it finds accelerators: it is told that there are some.
START = """
import os, json
os.environ["ACCELERATE_USE_CPU"] = "true"
FSDP = {fsdp}
if FSDP:
    os.environ |= {{"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_CPU_RAM_EFFICIENT_LOADING": "false"}}
    os.environ |= {{"FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP", "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT"}}
    os.environ |= {{"FSDP_TRANSFORMER_CLS_TO_WRAP": "LlamaDecoderLayer"}}
from accelerate import PartialState
from accelerate.utils import DistributedType
from training_runs import *
from optimum_fp8 import FP8Callback, FP8Config

def run(purpose, folder, *others, resume=None, changes=None, **options):
    config = FP8Config(dump_stats_path=f"{{folder}}_ranges/all", **changes or {{}})
    callback = FP8Callback(config, purpose=purpose)
    given = arguments(folder, **options)
    if FSDP:
        PartialState().distributed_type = DistributedType.MULTI_GPU
    data = {{"train_dataset": rows(), "eval_dataset": rows(6, seed=2)}}
    made = Trainer(llama(), given, callbacks=[callback, *others], **data)
    made.train(resume_from_checkpoint=resume)
    return callback, made
"""


def script(body: str, fsdp: bool) -> str:
    return START.format(fsdp=fsdp) + body


FOUND = """
callback, made = run("quantize", "run")
assert ("FSDP" in type(made.model).__name__) == FSDP
assert not any("FP8" in type(module).__name__ for module in made.model.modules())
found = {"fp8": callback.metrics["fp8"]["eval_fp8_loss"], "full": callback.metrics["full"]["eval_loss"]}
ranges = {name: float(callback.measurements.range(name)) for name, kind in callback.measurements.tensors}
with open(f"found{rank}.json", "w") as file:
    json.dump({**found, "ranges": ranges, "samples": callback.measurements.samples}, file)
monitor, _ = run("monitor", "monitored")
assert monitor.rates["drift"].keys() == ranges.keys()
"""


def found(folder, rank: int) -> dict:
    return json.loads((folder / f"found{rank}.json").read_text())


@pytest.mark.slow
def test_replicas_and_shards_of_a_model_end_with_the_same(tmp_path):
    results = []
    for fsdp in (False, True):
        folder = tmp_path / f"fsdp_{fsdp}"
        folder.mkdir()
        succeed(script(FOUND, fsdp), 2, folder)
        assert found(folder, 0) == found(folder, 1)
        results.append(found(folder, 0))
        model = AutoModelForCausalLM.from_pretrained(folder / "run" / "fp8")
        assert len(fp8_modules(model)) == 14
        assert Measurements.load(folder / "run_ranges" / "all").samples == 16
        AutoModelForCausalLM.from_pretrained(folder / "run")
    replicas, shards = results
    assert replicas["samples"] == shards["samples"] == 4 * 2 * 2
    assert shards["ranges"] == pytest.approx(replicas["ranges"], rel=1e-5)
    assert shards["fp8"] == pytest.approx(replicas["fp8"], rel=1e-4) and shards["fp8"] != shards["full"]


@pytest.mark.slow
def test_resumed_processes_have_the_ranges_of_all(tmp_path):
    body = """
saved = {"save_strategy": "steps", "save_steps": 2}
whole, _ = run("measure", "whole")
run("measure", "run", Stop(2), **saved)
resumed, _ = run("measure", "run", resume=True, **saved)
assert resumed.measurements.encoded() == whole.measurements.encoded()
trained, _ = run("qat", "trained", changes={"fake_quant": True, "amax_history_len": 2, "activation_scheme": "static"})
assert trained.metrics["fp8"]["eval_fp8_loss"] == trained.metrics["full"]["eval_loss"]
"""
    succeed(script(body, False), 2, tmp_path)
    assert len(fp8_modules(AutoModelForCausalLM.from_pretrained(tmp_path / "trained" / "fp8"))) == 14


@pytest.mark.slow
def test_what_one_process_refuses_ends_all(tmp_path):
    (tmp_path / "run" / "fp8").mkdir(parents=True)
    (tmp_path / "run" / "fp8" / "notes.txt").write_text("of another kind")
    ended = run_ranks(script('run("quantize", "run")', False), 2, tmp_path)
    assert all(each.status for each in ended)
    assert "would be overwritten" in ended[0].output.replace("\n", " ")
    assert "because rank 0 did" in ended[1].output
