"""The ranges in a checkpoint: which are kept, where they go, and that old checkpoints do without."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers as hf
from checkpoint.version_1_models import DATA
from hf.conftest import llama
from safetensors import safe_open
from transformers import AutoModel, AutoModelForCausalLM

from optimum_fp8 import FP8Config, convert, prepare, save
from optimum_fp8.checkpoint.ranges import known_ranges, ranges_within
from optimum_fp8.lifecycle import state_of
from optimum_fp8.modules import fp8_modules

STATIC = {"activation_scheme": "static", "target": "cpu"}
UP, ATTENTION = "model.layers.1.mlp.up_proj", "model.layers.1.self_attn"


def records(folder) -> list[dict]:
    found = []
    for path in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            found.append(json.loads(file.metadata()["optimum_fp8"]))
    return found


def quantized(folder: str, **options):
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=FP8Config(**{**STATIC, **options}))


@pytest.mark.core
@pytest.mark.parametrize("calibration", ["whole", "sequential"])
def test_a_number_for_each_tensor_that_scales_follow_from(save, batches, tmp_path, calibration):
    options = {"dataset": batches, "calibration": calibration, "dump_stats_path": str(tmp_path / "m")}
    model = quantized(save(llama()), **options)
    model.save_pretrained(tmp_path / "fp8")
    (record,) = records(tmp_path / "fp8")
    measured = state_of(model).measurements
    assert record["ranges"] == {name: {"input": measured.range(name).item()} for name in fp8_modules(model)}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "fp8")
    assert known_ranges(loaded) == record["ranges"]
    loaded.save_pretrained(tmp_path / "again")
    assert records(tmp_path / "again") == [record]


def test_attention_keeps_what_it_is_scaled_by(save, batches, tmp_path):
    folder, options = save(llama()), {"dataset": batches, "attention": True, "kv_cache": True}
    per_tensor = known_ranges(quantized(folder, **options))[ATTENTION]
    assert per_tensor.keys() >= {"q", "k", "v", "output"} and "weight" not in per_tensor
    assert not any("per_head" in str(said) for said in per_tensor.values())
    per_head = known_ranges(quantized(folder, attention_granularity="head", **options))[ATTENTION]
    assert len(per_head["q"]["per_head"]) == 4 and len(per_head["k"]["per_head"]) == 2


def test_an_observer_that_chooses_by_the_target_keeps_a_range_for_each(save, batches):
    model = quantized(save(llama()), dataset=batches, observer="mse", scale_method="maxabs_arbitrary")
    said = [kinds["input"] for kinds in known_ranges(model).values()]
    assert any(isinstance(each, dict) and each["range"].keys() == {"gaudi2", "gaudi3", "cuda", "cpu"} for each in said)


@pytest.mark.parametrize("options", [{"activation_scheme": "dynamic"}, {"activation_scheme": "weight_only"}], ids=str)
def test_where_scales_follow_from_no_range_none_is_kept(save, tmp_path, options):
    quantized(save(llama()), **options).save_pretrained(tmp_path / "fp8")
    assert "ranges" not in records(tmp_path / "fp8")[0]


def test_every_file_of_several_has_them(save, batches, tmp_path):
    model = quantized(save(llama()), dataset=batches)
    model.save_pretrained(tmp_path / "fp8", max_shard_size="40KB")
    found = records(tmp_path / "fp8")
    assert len(found) > 2 and all(each == found[0] for each in found) and len(found[0]["ranges"]) == 14


def test_a_model_with_another_head_has_those_of_its_modules(save, batches, tmp_path):
    quantized(save(llama()), dataset=batches).save_pretrained(tmp_path / "fp8")
    expected = records(tmp_path / "fp8")[0]["ranges"]
    base = AutoModel.from_pretrained(tmp_path / "fp8", quantization_config=FP8Config(target="gaudi2"))
    assert known_ranges(base) == ranges_within(expected, "model.")
    assert {module.input_scale.item() for module in fp8_modules(base).values()} <= {16.0, 1.0, 2.0**-4, 2.0**-8}


@pytest.mark.core
def test_a_part_that_is_saved_by_itself(tmp_path):
    text = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {**text, "image_size": 16, "patch_size": 8}
    torch.manual_seed(0)
    whole = hf.CLIPModel(hf.CLIPConfig(text_config=text | {"vocab_size": 50}, vision_config=vision, projection_dim=16))
    model = prepare(whole.eval(), FP8Config(**STATIC))
    with torch.no_grad():
        model(input_ids=torch.arange(6)[None], pixel_values=torch.ones(1, 3, 16, 16))
    convert(model)
    model.text_model.save_pretrained(tmp_path / "text")
    model.save_pretrained(tmp_path / "whole")
    of_part, of_whole = records(tmp_path / "text")[0]["ranges"], records(tmp_path / "whole")[0]["ranges"]
    assert of_part and of_part == ranges_within(of_whole, "text_model.")
    again = hf.CLIPModel.from_pretrained(tmp_path / "whole")
    again.text_model.save_pretrained(tmp_path / "text again")
    assert records(tmp_path / "text again")[0]["ranges"] == of_part


def test_compiled_modules_have_the_names_of_their_places(tmp_path):
    model = prepare(torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 4)), FP8Config(**STATIC))
    model(torch.ones(2, 8))
    convert(model)
    expected, model[0] = known_ranges(model), torch.compile(model[0])
    assert known_ranges(model) == expected and expected.keys() == {"0", "1"}
    save(model, tmp_path / "fp8")
    (record,) = records(tmp_path / "fp8")
    assert record["ranges"] == expected and record["modules"] == ["0", "1"]


@pytest.mark.core
@pytest.mark.parametrize("name", ["linear_static", "llama_static"])
def test_checkpoints_without_ranges_load_as_ever(name, caplog):
    from checkpoint.version_1_models import load

    assert known_ranges(load(name, DATA / name)) == {}
    assert "ranges" not in caplog.text
