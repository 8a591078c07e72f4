"""Exporting for readers of ModelOpt's checkpoints: what ModelOpt itself writes, see tests/data/modelopt/make.py."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from exporting.conftest import CALIBRATED_CACHE, wide_llama, wide_mixtral
from safetensors.torch import load_file

from optimum_fp8 import export
from optimum_fp8.checkpoint.modelopt import CONFIG_FILE
from optimum_fp8.errors import FP8CheckpointError

MODELOPTS = json.loads((Path(__file__).parents[1] / "data" / "modelopt" / "exports.json").read_text())
DOWN = "model.layers.0.mlp.down_proj"
CASES = {
    "FP8": (wide_llama, "FP8", {}),
    "FP8 and a cache": (wide_llama, "FP8", {"kv_cache": True}),
    "FP8_DYNAMIC": (wide_llama, "FP8_DYNAMIC", {}),
    "FP8_BLOCK": (wide_llama, "FP8_BLOCK", {}),
    "MXFP8": (wide_llama, "MXFP8", {}),
    "mixed": (wide_llama, "FP8_DYNAMIC", {"overrides": {"down_proj": {"scale_method": "mxfp8"}}}),
    "experts": (wide_mixtral, "FP8", {}),
}


def read(folder):
    """Tensors, and what the two files say of them."""
    said = {name: json.loads(Path(folder, name).read_text()) for name in ("config.json", CONFIG_FILE)}
    tensors = load_file(os.path.join(folder, "model.safetensors"))
    return tensors, said["config.json"]["quantization_config"], said[CONFIG_FILE]


def as_read(said):
    """What a configuration tells its readers: algorithms in capitals, and not who wrote it."""
    if isinstance(said, dict):
        said = {key: as_read(value) for key, value in said.items() if key != "producer"}
        return said | {key: said[key].upper() for key in ("quant_algo", "kv_cache_quant_algo") if said.get(key)}
    return said


@pytest.mark.parametrize("case", CASES)
def test_it_is_what_modelopt_writes(quantized, tmp_path, case):
    make, preset, options = CASES[case]
    _, folder = quantized(make(), preset, **options)
    tensors, config, hf_quant_config = read(export(folder, tmp_path / "out", "modelopt"))
    expected = MODELOPTS[case]
    assert {key: [str(each.dtype), list(each.shape)] for key, each in tensors.items()} == expected["tensors"]
    assert as_read(config) == as_read(expected["config"])
    assert as_read(hf_quant_config) == as_read(expected["hf_quant_config"])


@pytest.mark.parametrize("preset", ["FP8", "FP8_DYNAMIC", "FP8_BLOCK", "MXFP8"])
def test_values_are_ours(quantized, tmp_path, preset):
    model, folder = quantized(wide_llama(), preset)
    tensors, _, _ = read(export(folder, tmp_path / "out", "modelopt"))
    weight, scale = tensors[f"{DOWN}.weight"].float(), tensors[f"{DOWN}.weight_scale"]
    scale = torch.exp2(scale.float() - 127).repeat_interleave(32, 1) if preset == "MXFP8" else scale
    if scale.ndim == 4:
        scale = scale[:, 0, :, 0].repeat_interleave(128, 0).repeat_interleave(128, 1)
    found = weight * (scale[:, None] if scale.ndim == 1 else scale)
    torch.testing.assert_close(found, model.get_submodule(DOWN).weight.to(torch.float32), rtol=2**-8, atol=0)
    if preset == "FP8":
        assert torch.equal(tensors[f"{DOWN}.input_scale"].reshape(1), model.get_submodule(DOWN).input_scale)


def test_scales_of_a_cache_are_ours(quantized, tmp_path):
    model, folder = quantized(wide_llama(), "FP8_BLOCK", kv_cache=True, overrides=CALIBRATED_CACHE)
    tensors, config, hf_quant_config = read(export(folder, tmp_path / "out", "modelopt"))
    saved = load_file(folder / "model.safetensors")
    for part in "kv":
        ours = saved[f"model.layers.1.self_attn.fp8_scales.{part}_scale"]
        assert tensors[f"model.layers.1.self_attn.{part}_proj.{part}_scale"].item() == ours.item()
    assert config["kv_cache_scheme"] == {"dynamic": False, "num_bits": 8, "type": "float"}
    assert hf_quant_config["quantization"]["kv_cache_quant_algo"] == "FP8"


def test_blocks_of_weights_alone_are_what_the_algorithm_says(quantized, tmp_path):
    _, folder = quantized(wide_llama(), "FP8_BLOCK", activation_scheme="weight_only")
    assert read(export(folder, tmp_path / "out", "modelopt"))[1]["quant_algo"] == "FP8_PB_WO"


BY_HEAD = {"kv_cache": True, "attention_granularity": "head"}
ALL = {"kv_cache": True, "attention": True}


@pytest.mark.parametrize(
    "preset, options, message",
    [
        ("W8A16", {}, r"cannot express weights scaled per channel with inputs scaled by none, which model\.layers"),
        ("FP8_DYNAMIC", {"scale_method": "full_range"}, r"weights scaled per tensor with inputs scaled by \w+"),
        ("FP8", BY_HEAD, r"scales of a cache by head, which model\.layers\.0\.self_attn has: export it as"),
        ("FP8", ALL, r"output_scale and p_scale and q_scale, .*: without=\['output_scale', 'p_scale', 'q_scale'\]"),
        ("FP8_DYNAMIC", {"kv_cache": True}, "a cache in FP8 with no calibrated scales.*calibrate attention"),
        ("FP8_DYNAMIC", {"fp8_config": "E5M2"}, "float8_e5m2: quantize with fp8_config='E4M3'"),
    ],
)
def test_what_it_cannot_express_is_refused(quantized, tmp_path, preset, options, message):
    _, folder = quantized(wide_llama(), preset, **options)
    with pytest.raises(FP8CheckpointError, match=message):
        export(folder, tmp_path / "out", "modelopt")
    assert sorted(os.listdir(tmp_path)) == ["native", "plain"]


def test_rows_that_blocks_do_not_divide(quantized, tmp_path):
    _, folder = quantized(wide_llama(head_dim=32), "FP8_BLOCK")
    with pytest.raises(FP8CheckpointError, match="64 outputs, which blocks of 128 do not divide, which .*k_proj has"):
        export(folder, tmp_path / "out", "modelopt")
