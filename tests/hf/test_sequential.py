"""`calibration="sequential"` in from_pretrained: what it gives, where things are, and what it refuses."""

from __future__ import annotations

import copy
import fcntl
import json
import logging
import os
import weakref
from functools import partial
from pathlib import Path

import pytest
import torch
from hf.conftest import llama
from transformers import AutoModelForCausalLM, AutoTokenizer

from optimum_fp8 import FP8Config, calibrate, prepare, quantization_report
from optimum_fp8.errors import FP8CalibrationError, FP8ConfigError, FP8NotAvailableError
from optimum_fp8.hf.conversions import QuantizeWeight
from optimum_fp8.modules import fp8_modules

MAXABS = {"scale_method": "maxabs_arbitrary", "input_backoff": 1.0}


@pytest.fixture
def load(tmp_path, batches):
    """`load(folder, calibration="sequential", …)`: a model in bfloat16."""

    def load(folder, calibration="sequential", load=None, **keys):
        options = {"dataset": batches, "dump_stats_path": str(tmp_path / "work" / "m"), **MAXABS}
        config = FP8Config(**{**options, "calibration": calibration, **keys})
        return AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.bfloat16, quantization_config=config, **(load or {})
        )

    return load


def scales(model):
    return {name: float(module.input_scale) for name, module in fp8_modules(model).items()}


@pytest.mark.core
@pytest.mark.parametrize(
    "dtype, keys",
    [
        (torch.float32, {"calibration_inputs": "memory"}),
        (torch.bfloat16, {"calibration_inputs": "disk"}),
        (torch.bfloat16, {"attention": True, "decode_steps": 0}),
    ],
)
def test_one_block_is_calibrated_as_in_the_whole_model(save, load, ids, tmp_path, dtype, keys):
    folder = save(llama(num_hidden_layers=1), dtype)
    whole, blockwise = load(folder, "whole", **keys), load(folder, **keys)
    states = whole.state_dict(), blockwise.state_dict()
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], tensor) for name, tensor in states[1].items())
    assert torch.equal(whole(ids).logits, blockwise(ids).logits)
    assert not (tmp_path / "work").exists(), "nothing is left behind"


def note(seen, number, module, args):
    seen[number] = max(seen[number], float(args[0].abs().max()))


def test_later_blocks_see_what_quantized_ones_give(save, load, batches):
    """The range of what a block is given is what the finished model gives it; in whole calibration it is not."""
    folder = save(llama(num_hidden_layers=3, hidden_size=128), torch.float32)
    errors = {}
    for calibration in ("sequential", "whole"):
        model = load(folder, calibration)
        seen = dict.fromkeys(range(3), 0.0)
        for number, layer in enumerate(model.model.layers):
            layer.self_attn.q_proj.register_forward_pre_hook(partial(note, seen, number))
        with torch.no_grad():
            for batch in batches:
                model(**batch)
        found = {n: float(layer.self_attn.q_proj.input_scale) * 448 for n, layer in enumerate(model.model.layers)}
        errors[calibration] = [abs(found[n] / seen[n] - 1) for n in seen]
    assert max(errors["sequential"]) < 0.004, "half a unit of bfloat16, in which the scale is computed"
    assert max(errors["whole"]) > 0.004


@pytest.mark.slow
def test_same_selection_and_close_scales(save, load):
    folder = save(llama(num_hidden_layers=3))
    whole, blockwise = load(folder, "whole"), load(folder)
    expected, found = scales(whole), scales(blockwise)
    assert expected.keys() == found.keys()
    for name in expected:
        assert found[name] == pytest.approx(expected[name], rel=0.1), name
    report = str(quantization_report(blockwise))
    assert "model.layers.2.mlp.down_proj" in report


@pytest.mark.slow
def test_perplexity_is_that_of_whole_calibration(tmp_path):
    name = Path(__file__).parents[2] / "examples/llm/tiny_lm"
    tokenizer = AutoTokenizer.from_pretrained(name)
    text = (name / "heldout.txt").read_text(encoding="utf-8")[:6_000]
    ids = tokenizer(text, return_tensors="pt").input_ids[:, :1024].view(-1, 256)
    found = {}
    for calibration in ("whole", "sequential"):
        config = FP8Config(
            dataset=str(name / "calibration.txt"),
            num_calibration_samples=4,
            calibration=calibration,
            dump_stats_path=str(tmp_path / "m"),
        )
        model = AutoModelForCausalLM.from_pretrained(name, quantization_config=config)
        with torch.no_grad():
            found[calibration] = float(model(ids, labels=ids).loss.exp())
    print(found)
    assert found["sequential"] < found["whole"] * 1.005, found


@pytest.mark.slow
def test_attention_is_measured_on_prompts(save, load):
    folder = save(llama(num_hidden_layers=2))
    model = load(folder, attention=True)
    assert len(quantization_report(model).attention) == 2
    whole = load(folder, "whole", attention=True, decode_steps=0)
    for layer, other in zip(model.model.layers, whole.model.layers, strict=True):
        for name in ("q_scale", "k_scale", "v_scale", "output_scale"):
            expected = getattr(other.self_attn.fp8_scales, name)
            assert torch.allclose(getattr(layer.self_attn.fp8_scales, name), expected, rtol=0.1), name


def test_saved_and_loaded_like_any_other(save, load, ids, tmp_path):
    model = load(save(llama(tied=True), torch.float32), quantize_lm_head=True, modules_to_not_convert=[])
    assert "lm_head" in fp8_modules(model)
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(model(ids).logits, again(ids).logits)


def test_a_deep_copy_computes_the_same(save, load, ids):
    model = load(save(llama(hidden_size=256, intermediate_size=512)))  # large enough for files
    copied = copy.deepcopy(model)
    assert torch.equal(copied(ids).logits, model(ids).logits)


def test_weights_in_high_precision_are_gone_before_the_next(save, load, monkeypatch):
    """One weight is there in high precision at a time, and none once blocks are calibrated."""
    alive, most = [], 0
    quantize = QuantizeWeight._quantize

    def counted(self, name, module, tensor):
        nonlocal most
        alive.append(weakref.ref(tensor))
        most = max(most, sum(ref() is not None for ref in alive))
        return quantize(self, name, module, tensor)

    monkeypatch.setattr(QuantizeWeight, "_quantize", counted)
    model = load(save(llama(num_hidden_layers=3), torch.float32))
    assert len(alive) == len(fp8_modules(model)) and most == 1
    assert not any(ref() is not None for ref in alive)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_tensors_are_in_files(save, load, tmp_path, dtype):
    sizes = {"hidden_size": 256, "intermediate_size": 512, "vocab_size": 512, "num_hidden_layers": 1}
    model = load(save(llama(**sizes), dtype))
    places = mapped_files()
    for name, parameter in model.named_parameters():
        tensor = fp8_modules(model)[name.removesuffix(".weight")].codes if name.endswith("proj.weight") else parameter
        if tensor.nbytes >= 2**16:
            file = next(path for (start, end), path in places.items() if start <= tensor.data_ptr() < end)
            assert file.startswith(str(tmp_path)), f"{name} is in {file or 'memory'}"
    assert not list((tmp_path).glob("work*")), "the files have no names any more"


def mapped_files():
    """The files that addresses of this process are in."""
    places = {}
    with open("/proc/self/maps") as maps:
        for line in maps:
            span, *_, path = [*line.split(None, 5), ""][:6]
            start, end = (int(part, 16) for part in span.split("-"))
            places[start, end] = path.strip()
    return places


@pytest.mark.parametrize(
    "load_options",
    [
        pytest.param({"device_map": {"": "cpu"}}, marks=pytest.mark.slow),
        {"device_map": {"model.embed_tokens": "cpu", "model.layers": "disk", "model.norm": "cpu", "lm_head": "disk"}},
        {"device_map": "auto", "max_memory": {"cpu": 70_000}},
    ],
)
def test_device_maps(save, load, ids, tmp_path, load_options):
    folder = save(llama(num_hidden_layers=2), torch.float32)
    model, plain = load(folder, load=load_options), load(folder)
    logits = plain(ids).logits
    assert torch.equal(model(ids).logits, logits)
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "saved")(ids).logits, logits)


def test_disk_without_it_names_the_way(save, load):
    with pytest.raises(FP8NotAvailableError, match="calibration='sequential'"):
        load(save(llama()), "whole", load={"device_map": {"": "disk"}})


def test_a_line_for_each_block(save, load, caplog, tmp_path):
    log = tmp_path / "log.jsonl"
    with caplog.at_level(logging.INFO, logger="optimum_fp8"):
        load(save(llama(num_hidden_layers=2)), calibration_log=str(log))
    for number in range(2):
        beginning = f"calibrated block {number + 1} of 2 (model.layers.{number}) in "
        assert any(message.startswith(beginning) and "tokens/s" in message for message in caplog.messages)
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    blocks = [(line["block"], line["blocks"], line["name"]) for line in lines if line["event"] == "block"]
    assert blocks == [(1, 2, "model.layers.0"), (2, 2, "model.layers.1")]
    assert lines[-1]["event"] == "finished" and lines[-1]["samples"] == lines[0]["of"] == 16


@pytest.mark.parametrize(
    "keys, error, hint",
    [
        ({"mode": "MEASURE"}, FP8NotAvailableError, "mode='AUTO'"),
        ({"dataset": None}, FP8ConfigError, "dataset"),
        ({"kv_cache": True}, FP8NotAvailableError, "calibration='whole'"),
        ({"num_calibration_samples": "auto"}, FP8NotAvailableError, "give a number"),
        ({"dataset": lambda model: None}, FP8CalibrationError, "calls the model by itself"),
    ],
)
def test_refused_before_weights_are_read(save, load, monkeypatch, keys, error, hint):
    monkeypatch.setattr(QuantizeWeight, "convert", lambda *args, **kwargs: pytest.fail("weights were read"))
    with pytest.raises(error, match=hint):
        load(save(llama()), **keys)


def test_several_processes_are_refused(save, load, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(FP8NotAvailableError, match=r"in 2 processes.*calibration='whole'"):
        load(save(llama()))


def test_by_hand_is_refused(batches):
    with pytest.raises(FP8NotAvailableError, match="from_pretrained"):
        prepare(llama(), FP8Config(dataset=batches, calibration="sequential"))
    with pytest.raises(FP8NotAvailableError, match="calibrate: .*from_pretrained"):
        calibrate(prepare(llama(), FP8Config()), FP8Config(dataset=batches, calibration="sequential"))


def test_shortcomings_of_the_data_are_said(save, load, batches, caplog):
    load(save(llama()), dataset=[batches[0], batches[0]], min_tokens_per_module=10**6)
    said = " ".join(record.getMessage() for record in caplog.records)
    assert "tokens only" in said and "same as an earlier one" in said and "1000000" in said


def test_work_folder_that_cannot_be_written(save, load, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(FP8ConfigError, match="dump_stats_path"):
        load(save(llama()), dump_stats_path=str(tmp_path / "file" / "m"))
    assert os.listdir(tmp_path / "model")


def test_inputs_that_a_killed_process_left_are_removed_and_those_in_use_are_not(save, load, tmp_path):
    folder, work = save(llama()), tmp_path / "work" / "m_blocks"
    for name in ("inputs-left", "inputs-used"):
        (work / name).mkdir(parents=True)
        (work / name / "1.safetensors").write_text("")
    used = os.open(work / "inputs-used", os.O_RDONLY)
    fcntl.flock(used, fcntl.LOCK_EX)
    load(folder, calibration_inputs="disk")
    assert os.listdir(work) == ["inputs-used"]
    os.close(used)
    load(folder, calibration_inputs="disk")
    assert not work.exists()
