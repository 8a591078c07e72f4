"""Exporting for Intel Neural Compressor: files of ranges and scales that go with the model in high precision."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from exporting.conftest import wide_llama, wide_mixtral
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

from optimum_fp8 import FP8Config, export, prepare
from optimum_fp8.errors import FP8CheckpointError, FP8ConfigError
from optimum_fp8.lifecycle import state_of
from optimum_fp8.measure import read_inc

ROOT = Path(__file__).parents[2]
Q, O_PROJ = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.o_proj"
CHANNELS = "act_maxabs_pow2_weights_pcs_maxabs_pow2"
COMPUTED = ["maxabs_pow2", "full_range", CHANNELS]  # by INC, on a CPU
BY_PARTS = {
    "default": {
        "weight": {"granularity": "PCS", "rounding_method": "POW2", "backoff": 0.5},
        "activation": {"rounding_method": "HW_ALIGNED", "backoff": 0.5},
    }
}


def wide_gpt2():
    return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=96)).bfloat16()


def said(folder):
    with open(os.path.join(folder, "quant_config.json"), encoding="utf-8") as file:
        return json.load(file)


@pytest.fixture
def exported(quantized, tmp_path):
    """A Llama with static scales, and what is written of it."""

    def make(**options):
        model, folder = quantized(wide_llama(), "FP8", **{"target": "cpu", **options})
        return model, load_file(folder / "model.safetensors"), export(folder, tmp_path / "inc", "inc")

    return make


@pytest.mark.parametrize(
    "method, name",
    [
        ("maxabs_pow2", "maxabs_pow2"),
        ("maxabs_hw", "maxabs_hw"),
        ("full_range", "maxabs_arbitrary"),
        (CHANNELS, CHANNELS),
        (BY_PARTS, CHANNELS),
    ],
)
def test_scales_are_those_of_the_checkpoint(exported, method, name):
    _, saved, folder = exported(scale_method=method)
    config = said(folder)
    assert (config["mode"], config["scale_method"], config["fp8_config"]) == ("QUANTIZE", name, "E4M3")
    assert config["scale_format"] == ("CONST" if name == CHANNELS else "SCALAR")
    inc = read_inc(os.path.join(folder, "measure", "inc_output"))
    scales = inc.scales[name.upper()]
    layers = [key.removesuffix(".weight") for key, each in saved.items() if each.dtype == torch.float8_e4m3fn]
    assert scales.keys() == inc.ranges.keys() == set(layers) == set(inc.modules) and len(layers) == 14
    for layer in layers:
        node = scales[layer]
        assert node.inputs[0].item() == saved[f"{layer}.input_scale"].item()
        weight = node.params["weight"]
        assert torch.equal(
            (weight[0] if isinstance(weight, dict) else weight).flatten(), saved[f"{layer}.weight_scale"].flatten()
        )


def test_ranges_are_those_that_were_recorded(exported):
    model, saved, folder = exported(scale_method="maxabs_pow2")
    inc = read_inc(os.path.join(folder, "measure", "inc_output"))
    plain = wide_llama()
    for layer in (Q, O_PROJ):
        found, weight = inc.ranges[layer].params["weight"].item(), plain.get_submodule(layer).weight
        largest = (saved[f"{layer}.weight"].float() * saved[f"{layer}.weight_scale"]).abs().max().item()
        assert found == largest and abs(found / weight.abs().max().item() - 1) <= 2**-4
        scale, largest_input = saved[f"{layer}.input_scale"].item(), inc.ranges[layer].inputs[0].item()
        assert 2 ** torch.tensor(largest_input / 448 / 0.25).log2().ceil().item() == scale


def test_our_own_reader_takes_the_configuration(exported):
    _, _, folder = exported(scale_method="maxabs_pow2")
    config = FP8Config.from_json_file(os.path.join(folder, "quant_config.json"))
    model = prepare(wide_llama(), config.replace(mode="MEASURE", target="cpu"))
    assert set(state_of(model).selected) == read_inc(os.path.join(folder, "measure", "inc_output")).ranges.keys()


def test_attention_goes_by_the_names_of_optimum_habana(exported):
    _, saved, folder = exported(scale_method="maxabs_pow2", attention=True, kv_cache=True)
    place = "model.layers.1.self_attn"
    scales = read_inc(os.path.join(folder, "measure", "inc_output")).scales["MAXABS_POW2"]
    operations = {name.removeprefix(f"{place}.") for name in scales if name.startswith(place)}
    assert operations >= {"matmul_qk", "matmul_av", "softmax", "k_cache", "v_cache"}
    for operand, number, operation in (("q", 0, "matmul_qk"), ("k", 1, "matmul_qk"), ("v", 1, "matmul_av")):
        ours = saved[f"{place}.fp8_scales.{operand}_scale"].item()
        assert scales[f"{place}.{operation}"].inputs[number].item() == ours
    assert any("matmul_qk" in name for name in said(folder)["allowlist"]["names"])


def test_instructions_stand_beside_them(exported):
    _, _, folder = exported(scale_method="maxabs_pow2")
    with open(os.path.join(folder, "README.md"), encoding="utf-8") as file:
        text = file.read()
    assert "LlamaForCausalLM with 14 layers in FP8" in text and "made for cpu, whose largest FP8 value is 448" in text
    assert sorted(os.listdir(folder)) == ["README.md", "measure", "quant_config.json"]
    assert len(os.listdir(os.path.join(folder, "measure"))) == 5


@pytest.mark.parametrize(
    "make, preset, options, message",
    [
        (wide_llama, "FP8_DYNAMIC", {}, "inputs that are scaled as they come, which .*_proj has: .*static scales"),
        (wide_llama, "W8A16", {}, "weights alone in FP8, which .*_proj has"),
        (wide_llama, "FP8", {"scale_method": "unit_scale"}, "does not record the ranges of model.*_proj"),
        (wide_mixtral, "FP8", {}, "a weight of MixtralExperts, which model.*experts"),
        (wide_gpt2, "FP8", {}, "a weight of Conv1D, which .*c_attn has: INC replaces Linear and Conv2d"),
        (wide_llama, "FP8", {"overrides": {"down": {"scale_method": CHANNELS}}}, "scaled or rounded in different ways"),
    ],
)
def test_what_inc_cannot_do_is_refused(quantized, tmp_path, make, preset, options, message):
    _, folder = quantized(make(), preset, **options)
    with pytest.raises(FP8CheckpointError, match=message):
        export(folder, tmp_path / "out", "inc")
    assert sorted(os.listdir(tmp_path)) == ["native", "plain"]


def test_a_format_that_is_not_there(tmp_path):
    with pytest.raises(FP8ConfigError, match="format='INC' is not one to export to"):
        export(tmp_path, tmp_path / "out", "INC")


@pytest.mark.slow
@pytest.mark.parametrize("method", COMPUTED)
def test_inc_computes_what_we_do(exported, tmp_path, method):
    """To the bit but for sums in another order; scales that are no powers of two INC rounds to bfloat16."""
    model, saved, folder = exported(scale_method=method, use_qdq=True)
    ids, plain = torch.randint(0, 96, (2, 12)), wide_llama().eval()
    save_file({"ids": ids}, tmp_path / "ids.safetensors")
    subprocess.run(["make", "-s", ".venv-inc/.ready"], cwd=ROOT, check=True, capture_output=True)
    environment = {**os.environ, "INC_TARGET_DEVICE": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": ""}
    arguments = [str(tmp_path / "plain"), str(tmp_path / "ids.safetensors"), folder]
    command = [ROOT / ".venv-inc" / "bin" / "python", Path(__file__).with_name("inc_folder_worker.py"), *arguments]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    incs = load_file(f"{folder}.safetensors")
    assert incs["layers"].item() == 14
    model.set_attn_implementation("eager"), plain.set_attn_implementation("eager")
    with torch.no_grad():
        ours, original = (each(ids).logits.float() for each in (model, plain))
    error, rounding = (ours - incs["logits"].float()).norm(), (ours - original).norm()
    exact = method != "full_range"
    assert error < (0.25 if exact else 0.75) * rounding
    same = saved[f"{Q}.weight"].squeeze(0).view(torch.uint8) == incs["codes"].T
    assert same.all() if exact else same.float().mean() > 0.9
