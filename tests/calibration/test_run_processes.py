"""Many processes: the same measurements and checkpoints as one gives, to the byte, and an end for all if one ends."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from ranks import run_ranks, succeed
from tiny_models import tiny_llama

START = """
import torch
from safetensors.torch import save_file
from tiny_models import tiny_llama
from transformers import AutoModelForCausalLM
from optimum_fp8 import FP8Config, Measurements, calibrate, convert, finalize_calibration, prepare
from optimum_fp8.measure import processes

torch.manual_seed(0)
model = tiny_llama()
batches = [{"input_ids": torch.randint(3, 64, (1 + n % 2, 8 + n))} for n in range(5)]

def config(**keys):
    return FP8Config(**{"dataset": batches, "attention": True, "kv_cache": True, "decode_steps": 2, **keys})
"""

ALL_WAYS = (
    START
    + """
def load(**keys):
    return AutoModelForCausalLM.from_pretrained("../llama", quantization_config=config(**keys))

load(mode="MEASURE", dump_stats_path="measure")
load(mode="MEASURE", dump_stats_path="few", dataset=batches[:1])   # not one for each
loaded = load()
loaded.save_pretrained("checkpoint")
save_file(loaded.state_dict(), f"rank{rank}.safetensors")  # save_pretrained writes in rank 0 only
prepare(model, config(dump_stats_path="by_hand"))
for batch in batches[rank::count]:
    model(**batch)
finalize_calibration(model)
assert convert(model)(**batches[0]).logits.isfinite().all()

class Look:
    seen = []

    def is_due(self, batches):
        return batches in (2, 3)

    def note(self, measurements, batches, samples):
        self.seen.append([batches, samples, measurements.encoded().hex()])
        return batches == 3

    def state(self):
        return {}

torch.manual_seed(0)
looked_at = prepare(tiny_llama(), config())
calibrate(looked_at, checks=[Look()])
convert(looked_at)
if rank == 0:
    import json
    json.dump(Look.seen, open("looks.json", "w"))
"""
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    torch.manual_seed(0)
    tiny_llama().save_pretrained(folder / "llama")
    return folder


def ran(folder: Path, count: int) -> Path:
    """What `ALL_WAYS` writes in so many processes."""
    results = folder / str(count)
    if not results.exists():
        results.mkdir()
        succeed(ALL_WAYS, count, results)
    return results


def parts(checkpoint: Path) -> tuple[object, bytes]:
    """The header and the tensors of a checkpoint; safetensors writes the header's metadata in any order."""
    data = (checkpoint / "model.safetensors").read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:end]), data[end:]


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_any_number_of_processes_gives_the_same_bytes(folder, count):
    one, many = ran(folder, 1), ran(folder, count)
    for name in ("measure", "few", "by_hand"):
        file = f"{name}_measurements.safetensors"
        assert (one / file).read_bytes() == (many / file).read_bytes(), name
    assert (one / "looks.json").read_text() == (many / "looks.json").read_text(), "checks look at the same"
    assert [look[0] for look in json.loads((one / "looks.json").read_text())] == [2, 3], "and the last ends it"
    assert parts(one / "checkpoint") == parts(many / "checkpoint")
    assert (one / "checkpoint" / "config.json").read_text() == (many / "checkpoint" / "config.json").read_text()
    for rank in range(count):
        state = (many / f"rank{rank}.safetensors").read_bytes()
        assert state == (one / "rank0.safetensors").read_bytes(), "each has the ranges of all"


SHARDED = (
    START
    + """
from torch.distributed.fsdp import fully_shard
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from optimum_fp8.errors import FP8NotAvailableError
from optimum_fp8.measure import model_fingerprint

def refused(action, word):
    try:
        action()
    except FP8NotAvailableError as error:
        assert word in str(error), error
    else:
        raise AssertionError(word)

whole = model_fingerprint(model)
if count > 1:
    torch.distributed.init_process_group("gloo")
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
assert model_fingerprint(model) == whole
prepare(model, config(dump_stats_path="fsdp", measure_exclude="NONE"))
calibrate(model)
if count > 1:
    refused(lambda: convert(model), "spread over processes")
finalize_calibration(model)
if count > 1:
    parallel = tiny_llama()
    mesh = init_device_mesh("cpu", (count,))
    parallelize_module(parallel.model.layers[0].mlp, mesh, {"up_proj": ColwiseParallel()})
    refused(lambda: prepare(parallel, config()), "tensor parallelism")
    refused(lambda: AutoModelForCausalLM.from_pretrained("../llama", quantization_config=config(), tp_plan="auto"),
            "spreads this model over processes")
    torch.distributed.barrier()  # the others may still be finding each other through the first
"""
)


@pytest.mark.slow
def test_shards_are_measured_as_the_whole_model(folder):
    files = []
    for count in (1, 2):
        results = folder / f"sharded{count}"
        results.mkdir()
        succeed(SHARDED, count, results)
        files.append((results / "fsdp_measurements.safetensors").read_bytes())
    assert files[0] == files[1]


TROUBLE = (
    START
    + """
import json, sys
said = {}

def trouble(name, action):
    try:
        action()
    except Exception as error:
        said[name] = f"{type(error).__name__}: {error}"

def with_data(data, changed=lambda model: None):
    torch.manual_seed(0)
    model = tiny_llama()
    changed(model)
    calibrate(prepare(model, config(dataset=data)))

def source():
    for number, batch in enumerate(batches):
        if rank == 1 and number == 3:
            raise OSError("the disk is gone")
        yield batch

def own_loop():
    prepare(model, config(dump_stats_path="own"))
    model(**batches[rank])
    if rank == 1:
        model.model.embed_tokens.weight.data.mul_(2)
    finalize_calibration(model)

changed = [batches[0], {"input_ids": batches[1]["input_ids"] + rank}, *batches[2:]]
trouble("source", lambda: with_data(source()))
trouble("model", lambda: with_data([batches[0], {"input_ids": torch.full((1, 8), 99)}]))
trouble("values", lambda: with_data(changed))
trouble("fewer", lambda: with_data(batches[:5 - rank]))
trouble("weights", lambda: with_data(batches, lambda model: model.lm_head.weight.data.mul_(1 + rank)))
trouble("own loop", own_loop)
with open(f"said{rank}.json", "w") as file:
    json.dump(said, file)
"""
)
STOPPED = "FP8CalibrationError: calibration stopped, because rank 1 did: "
DISK, BATCH = (
    "OSError: the disk is gone",
    "FP8CalibrationError: the model cannot be run on the calibration batch after 0",
)
CHANGED = "FP8MeasurementError: weights of the model have changed since activations were measured"


def test_an_error_in_one_process_ends_all_which_say_why(folder):
    results = folder / "trouble"
    results.mkdir()
    succeed(TROUBLE, 2, results)
    first, second = (json.loads((results / f"said{rank}.json").read_text()) for rank in range(2))
    assert (first["source"], second["source"]) == (STOPPED + DISK, DISK)
    assert first["model"].startswith(STOPPED + BATCH) and second["model"].startswith(BATCH)
    assert first["own loop"].startswith(STOPPED + CHANGED) and second["own loop"].startswith(CHANGED)
    assert not (results / "own_measurements.safetensors").exists()
    for said in (first, second):
        assert "rank 1 has other data than rank 0 after 2 batches: give all processes the same" in said["values"]
        assert "rank 1 has other data than rank 0 after" in said["fewer"]
        assert "rank 1 measures another model than rank 0" in said["weights"]


@pytest.mark.parametrize("victim", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_a_process_that_is_killed_ends_the_others_which_say_which(folder, victim):
    body = (
        START
        + f"""
import os

def die(module, args):
    if rank == {victim} and args[0].shape[-2] == 11 + {victim}:  # in its second batch
        os.kill(os.getpid(), 9)

model.model.layers[0].mlp.register_forward_pre_hook(die)
calibrate(prepare(model, config()))
"""
    )
    ended = run_ranks(body, 3, folder)
    assert ended[victim].status == -9
    for rank in {0, 1, 2} - {victim}:
        assert ended[rank].status == 1 and f"rank {victim} was lost" in ended[rank].output, ended[rank].output


@pytest.mark.slow
def test_an_error_with_a_sharded_model_ends_all(folder):
    body = (
        START
        + """
from torch.distributed.fsdp import fully_shard

torch.distributed.init_process_group("gloo")
fully_shard(model.model.layers[0])
fully_shard(model)
if rank == 1:
    batches[3] = {"input_ids": torch.full((1, 8), 99)}
calibrate(prepare(model, config()))
"""
    )
    first, second = run_ranks(body, 2, folder)
    assert first.status == second.status == 1
    assert "index out of range" in second.output and "FP8CalibrationError" in first.output


@pytest.mark.slow
@pytest.mark.parametrize("before, after", [(2, 1), pytest.param(1, 2, marks=pytest.mark.slow)])
def test_another_number_of_processes_goes_on(folder, before, after):
    results = folder / f"resumed{before}{after}"
    results.mkdir()
    body = (
        START
        + """
from optimum_fp8.calibration import resume
resume.INTERVAL, resume._LITTLE = 0.0, 1e9
passes = []

def broken(module, args):
    passes.append(args[0].shape[-2])
    if BREAKS and passes[-1] == 12:
        raise OSError("gone")

model.model.layers[0].mlp.register_forward_pre_hook(broken)
prepare(model, config(dump_stats_path="resumed", decode_steps=0))
calibrate(model)
finalize_calibration(model)
print("passes", passes)
"""
    )
    whole = folder / "whole"
    whole.mkdir(exist_ok=True)
    succeed(f"BREAKS = False\n{body}", 1, whole)
    assert all(each.status == 1 for each in run_ranks(f"BREAKS = True\n{body}", before, results))
    assert (results / "resumed_partial.safetensors").exists()
    ended = run_ranks(f"BREAKS = False\n{body}", after, results)
    assert "passes [12]" in ended[0].output, ended[0].output
    name = "resumed_measurements.safetensors"
    assert (results / name).read_bytes() == (whole / name).read_bytes()
    assert not (results / "resumed_partial.safetensors").exists()
