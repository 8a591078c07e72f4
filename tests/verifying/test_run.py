"""Checkpoints in the formats of other engines: sound ones are found sound, and each has rules of its own."""

from __future__ import annotations

import pytest
import torch
from grids import slow_but
from safetensors.torch import load_file, save_file
from tiny_models import tiny_llama
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from verifying.conftest import UP, edit, edit_json, told

from optimum_fp8 import FP8Config, export, verify
from optimum_fp8.verifying import Finding

OTHERS = {"format": "pt"}


def exported(tmp_path, preset: str, format: str):
    """A folder with a model whose matrices have several blocks."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "intermediate_size": 384, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=64)).bfloat16().save_pretrained(tmp_path / "base")
    config = FP8Config.preset(preset)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=config)
    model.save_pretrained(tmp_path / "ours")
    export(tmp_path / "ours", tmp_path / "exported", format)
    return tmp_path / "exported"


@pytest.mark.parametrize(
    "preset, format, scale, shape",
    slow_but(
        [
            ("FP8_BLOCK", "fp8", "weight_scale_inv", (3, 2)),
            ("FP8_BLOCK", "compressed-tensors", "weight_scale", (3, 2)),
            ("MXFP8", "fp8", "weight_scale_inv", (384, 8)),
            ("FP8_DYNAMIC", "compressed-tensors", "weight_scale", (384, 1)),
        ],
        ("FP8_BLOCK", "fp8", "weight_scale_inv", (3, 2)),
        ("FP8_DYNAMIC", "compressed-tensors", "weight_scale", (384, 1)),
    ),
)
def test_formats_that_are_exported(tmp_path, preset, format, scale, shape):
    folder, name = exported(tmp_path, preset, format), f"{UP}.{scale}"
    assert told(folder, against=tmp_path / "base") == []
    assert load_file(folder / "model.safetensors")[name].shape == shape
    edit(folder, lambda tensors: tensors.update({name: tensors[name][:2].clone()}), OTHERS)
    assert any(each.startswith(f"error: {name}: found a scale of shape (2, {shape[1]})") for each in told(folder))


@pytest.mark.parametrize("method", [{"quant_method": "modelopt", "quant_algo": "FP8"}, {"quant_method": "fbgemm_fp8"}])
def test_methods_that_are_not_exported(copied, made, method):
    folder = copied("compressed-tensors")
    said = {**method, "ignore": ["lm_head"]}
    edit(folder, lambda tensors: None, OTHERS)
    edit_json(folder, "config.json", lambda config: config.update(quantization_config=said))
    assert told(folder, against=made["base"]) == []
    edit(folder, lambda tensors: tensors.pop(f"{UP}.input_scale"), OTHERS)
    missing = any(each.startswith(f"error: {UP}: found no scale of the input") for each in told(folder))
    assert missing is (method["quant_method"] == "modelopt")


def test_findings_are_sorted_and_said_once(copied):
    folder = copied("compressed-tensors")
    edit(folder, lambda tensors: tensors[f"{UP}.weight_scale"].zero_(), OTHERS)
    (folder / "extra.safetensors").write_bytes(b"")
    found = verify(folder)
    assert [each.severity for each in found] == ["error", "warning"] and isinstance(found[0], Finding)


def test_a_cast_without_any_scale(tmp_path):
    model = tiny_llama().to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    cast = {name: each.to(torch.float8_e4m3fn) if "proj" in name else each for name, each in tensors.items()}
    save_file(cast, tmp_path / "model.safetensors")
    found = told(tmp_path)
    assert any("quant_method: found nothing" in each for each in found)
    assert any(f"{UP}.weight: found codes in torch.float8_e4m3fn without a scale" in each for each in found)
