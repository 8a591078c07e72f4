"""Checkpoints that are quantized already are no source for another quantization: refused by tensor and dtype."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hf.conftest import llama
from safetensors.torch import load_file, save_file
from tiny_models import tiny_bert, tiny_gpt2
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM

from optimum_fp8 import FP8Config, convert, prepare
from optimum_fp8.errors import FP8CheckpointError, FP8SelectionError
from optimum_fp8.modules import fp8_modules

WEIGHT = "model.layers.1.mlp.up_proj.weight"
CONFIG = FP8Config(activation_scheme="weight_only")


def rewrite(folder: str, change) -> None:
    """Replace tensors of a checkpoint by what `change` makes of them, shard by shard."""
    for path in Path(folder).glob("*.safetensors"):
        tensors = load_file(path)
        save_file(change(tensors), path, metadata={"format": "pt"})


def with_codes(dtype):
    def change(tensors):
        return {key: (value.float() * 100).to(dtype) if key == WEIGHT else value for key, value in tensors.items()}

    return change


def load(folder: str, config: FP8Config = CONFIG):
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.bfloat16)


@pytest.mark.core
@pytest.mark.parametrize("mode", ["AUTO", "MEASURE"])
@pytest.mark.parametrize(
    "dtype", ["float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu", "float8_e4m3fnuz", "float8_e5m2fnuz", "int8", "uint8"]
)
def test_weights_in_codes(save, dtype, mode, tmp_path):
    folder = save(llama())
    rewrite(folder, with_codes(getattr(torch, dtype)))
    with pytest.raises(FP8CheckpointError, match=rf"{WEIGHT} in model.safetensors is [FIU]8.*quantize the original"):
        load(folder, FP8Config(mode=mode, dump_stats_path=str(tmp_path / "stats")))


def test_in_any_shard(save):
    folder = save(llama(num_hidden_layers=4), max_shard_size="60KB")
    rewrite(folder, with_codes(torch.float8_e4m3fn))
    with pytest.raises(FP8CheckpointError, match=rf"{WEIGHT} in model-0000\d-of.*F8_E4M3"):
        load(folder)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
def test_in_bin_files(save, dtype):
    folder = Path(save(llama()))
    tensors = with_codes(dtype)(load_file(folder / "model.safetensors"))
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    with pytest.raises(FP8CheckpointError, match=rf"{WEIGHT} in pytorch_model.bin is torch.{str(dtype)[6:]}"):
        load(str(folder))


def test_high_precision_bin_files_are_quantized(save):
    folder = Path(save(llama()))
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert len(fp8_modules(load(str(folder)))) == 14


@pytest.mark.parametrize(
    "beside",
    ["weight_scale", "weight_scale_inv", "input_scale", "scales", "qweight", "weight_packed", "SCB", "qzeros"]
    + ["weight_zero_point", "weight_quantizer._amax", "scale_weight"],
)
def test_scales_beside_weights_by_the_names_of_other_tools(save, beside):
    folder, name = save(llama()), WEIGHT.replace("weight", beside)
    rewrite(folder, lambda tensors: tensors | {name: torch.ones(1)})
    with pytest.raises(FP8CheckpointError, match=rf"{name} in .* belongs to a quantized weight"):
        load(folder)


@pytest.mark.parametrize("method", ["modelopt", "quark_next", None])
def test_by_a_tool_that_transformers_does_not_know(save, method):
    folder = Path(save(llama()))
    rewrite(str(folder), with_codes(torch.float8_e4m3fn))
    config = json.loads((folder / "config.json").read_text())
    if method is None:
        (folder / "hf_quant_config.json").write_text(json.dumps({"quantization": {"quant_algo": "FP8"}}))
    else:
        config["quantization_config"] = {"quant_method": method}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(FP8CheckpointError, match=f"{WEIGHT}.*F8_E4M3"):
        load(str(folder))


def test_a_checkpoint_of_ours_without_its_configuration(save, tmp_path):
    load(save(llama())).save_pretrained(tmp_path / "fp8")
    path = tmp_path / "fp8" / "config.json"
    config = json.loads(path.read_text())
    del config["quantization_config"]
    path.write_text(json.dumps(config))
    with pytest.raises(FP8CheckpointError, match="is F8_E4M3"):
        load(str(tmp_path / "fp8"))


def test_a_checkpoint_of_ours_for_another_quantization(save, tmp_path):
    load(save(llama())).save_pretrained(tmp_path / "fp8")
    with pytest.raises(FP8CheckpointError, match="quantize the original"):
        load(str(tmp_path / "fp8"), FP8Config(activation_scheme="dynamic", fp8_config="E5M2"))


@pytest.mark.parametrize("make", [tiny_gpt2, tiny_bert])
def test_integers_that_are_no_weights_are_none_of_its_business(save, make):
    folder = save(make())
    more = {
        "h.0.attn.bias": torch.ones(1, 1, 8, 8, dtype=torch.uint8),
        "embeddings.position_ids": torch.arange(8)[None],
    }
    rewrite(folder, lambda tensors: tensors | more)
    assert fp8_modules(AutoModel.from_pretrained(folder, quantization_config=CONFIG))


def in_codes(dtype, weight="weight"):
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    model[2].weight = nn.Parameter((torch.randn(8, 8) * 100).to(dtype), requires_grad=False)
    return model


@pytest.mark.parametrize("step", [prepare, convert])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.int8])
def test_modules_whose_weights_are_codes(step, dtype):
    model = in_codes(dtype)
    with pytest.raises(FP8SelectionError, match=rf"2: its weight is {dtype}.*high precision.*blocklist"):
        step(model, CONFIG)
    assert not fp8_modules(model)


@pytest.mark.parametrize("options", [{"blocklist": {"names": ["^2$"]}}, {"allowlist": {"names": ["^0$"]}}])
def test_the_rest_of_a_model_can_be_quantized(options):
    assert list(fp8_modules(convert(in_codes(torch.float8_e4m3fn), CONFIG.replace(**options)))) == ["0"]
