"""Provenance in checkpoints: it goes where the weights go."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers as hf
from checkpoint.version_1_models import DATA
from hf.conftest import llama
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM
from unsealed import unsealed

from optimum_fp8 import FP8CheckpointError, FP8Config, FP8StateError, convert, load, prepare, quantize_files, save
from optimum_fp8.checkpoint.provenance import provenance_of, record_in, recorded_provenance, told_of
from optimum_fp8.lifecycle.provenance import versions
from optimum_fp8.modules import fp8_modules

STATIC = {"activation_scheme": "static", "target": "cpu"}


def quantized(folder: str, **options):
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=FP8Config(**{**STATIC, **options}))


def net():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 4))


@pytest.mark.core
def test_of_a_model_and_of_its_checkpoint_saved_loaded_and_saved_again_in_shards(save, batches, tmp_path):
    model = quantized(save(llama()), dataset=batches, attention=True)
    told = provenance_of(model)
    assert told["made_with"] == versions() and told["changes"] == []
    assert told["config"] == json.loads(json.dumps(model.config.quantization_config.to_dict()))
    assert told["data"]["source"] == "list" and told["data"]["samples"] == 8 and told["data"]["tokens"] > 0
    assert told["modules"].keys() > fp8_modules(model).keys() and told["modules"]["model.layers.0.self_attn"]["q"] > 0
    assert "lm_head" in told["skipped"]
    model.save_pretrained(tmp_path / "fp8")
    assert provenance_of(tmp_path / "fp8") == told
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "fp8")
    assert provenance_of(again) == told
    again.save_pretrained(tmp_path / "again", max_shard_size="40KB")
    assert provenance_of(tmp_path / "again") == told
    files = sorted((tmp_path / "again").glob("*.safetensors"))
    assert len(files) > 2
    for path in files:
        with safe_open(path, framework="pt") as file:
            assert json.loads(file.metadata()["optimum_fp8"])["provenance"]["made_with"] == versions()


def test_a_checkpoint_loaded_for_another_target_says_so(save, batches, tmp_path):
    quantized(save(llama()), dataset=batches, target="gaudi3").save_pretrained(tmp_path / "3")
    config = FP8Config(target="gaudi2")
    AutoModelForCausalLM.from_pretrained(tmp_path / "3", quantization_config=config).save_pretrained(tmp_path / "2")
    before, after = provenance_of(tmp_path / "3"), provenance_of(tmp_path / "2")
    (change,) = after["changes"]
    assert (change["before"], change["target"], change["made_with"]) == ("gaudi3", "gaudi2", versions())
    assert after["config"]["target"] == "gaudi2" and after["data"] == before["data"]


@pytest.mark.parametrize("max_shard_size", ["5GB", 300])
def test_any_module_goes_through_save_and_load(tmp_path, max_shard_size):
    model = prepare(net(), FP8Config(**STATIC))
    model(torch.ones(2, 8))
    told = provenance_of(convert(model))
    save(model, tmp_path / "fp8", max_shard_size=max_shard_size)
    assert provenance_of(tmp_path / "fp8") == {**told, "config": {**told["config"], "model_class": None}}
    assert provenance_of(load(tmp_path / "fp8", net())) == told
    other = load(tmp_path / "fp8", net(), target="gaudi2")
    assert [each["target"] for each in provenance_of(other)["changes"]] == ["gaudi2"]


@pytest.mark.parametrize("names_only", [False, True])
def test_files_that_are_quantized_without_their_model(save, tmp_path, names_only):
    config = FP8Config(activation_scheme="dynamic", target="cpu")
    quantize_files(save(llama()), tmp_path / "fp8", config, names_only=names_only)
    told = provenance_of(tmp_path / "fp8")
    assert told["made_with"] == versions() and told["data"] == {} and len(told["modules"]) == 14
    assert any("lm_head" in name or "embed" in name for name in told["skipped"])


def test_a_part_has_that_of_the_whole(tmp_path):
    text = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {**text, "image_size": 16, "patch_size": 8}
    whole = hf.CLIPModel(hf.CLIPConfig(text_config=text | {"vocab_size": 50}, vision_config=vision, projection_dim=16))
    model = convert(whole.eval(), FP8Config(activation_scheme="dynamic", target="cpu"))
    model.text_model.save_pretrained(tmp_path / "text")
    assert record_in(tmp_path / "text")["provenance"] == told_of(model)["provenance"]


def test_a_model_with_another_head_keeps_it(save, batches, tmp_path):
    quantized(save(llama()), dataset=batches).save_pretrained(tmp_path / "fp8")
    base = AutoModel.from_pretrained(tmp_path / "fp8")
    assert provenance_of(base)["data"] == provenance_of(tmp_path / "fp8")["data"]


def test_older_checkpoints_tell_less(tmp_path):
    told = provenance_of(DATA / "llama_static")
    assert told["made_with"] == told["data"] == told["skipped"] == {} and told["date"] == "" and told["config"]
    model = AutoModelForCausalLM.from_pretrained(DATA / "llama_static")
    model.save_pretrained(tmp_path / "again")
    assert "provenance" not in record_in(tmp_path / "again")


@pytest.mark.parametrize("found", [[], "x", {"made_with": []}, {"date": 3}, {"changes": {}}], ids=str)
def test_what_cannot_be_read_is_an_error_here_and_when_loading(found, tmp_path):
    with pytest.raises(FP8CheckpointError, match="the provenance in the record of the checkpoint cannot be read"):
        recorded_provenance({"provenance": found})
    save(convert(net(), FP8Config(activation_scheme="dynamic", target="cpu")), tmp_path / "fp8")
    path = tmp_path / "fp8" / "model.safetensors"
    with safe_open(path, framework="pt") as file:
        said = json.loads(file.metadata()["optimum_fp8"])
    metadata = {"format": "pt", "optimum_fp8": json.dumps({**said, "provenance": found})}
    save_file(load_file(path), path, unsealed(metadata))
    for read in (provenance_of, lambda folder: load(folder, net())):
        with pytest.raises(FP8CheckpointError, match="provenance"):
            read(tmp_path / "fp8")


def test_what_is_no_fp8_model_or_checkpoint_has_none(save, tmp_path):
    with pytest.raises(FP8StateError, match="provenance_of: Sequential is not converted to FP8"):
        provenance_of(net())
    with pytest.raises(FP8CheckpointError, match="quantization_config"):
        provenance_of(save(llama()))
    with pytest.raises(FP8CheckpointError, match=r"quantization\.json does not exist"):
        provenance_of(Path(tmp_path))
