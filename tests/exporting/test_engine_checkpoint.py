"""Exporting: names, shapes and dtypes are those that engines read, and the values are those of the model in FP8."""

from __future__ import annotations

import json
import os

import pytest
import torch
from exporting.conftest import CALIBRATED_CACHE, wide_llama, wide_mixtral
from safetensors.torch import load_file
from torch import nn

from optimum_fp8 import FP8Config, convert, export, prepare
from optimum_fp8.errors import FP8CheckpointError, FP8ConfigError, FP8StateError

Q, K, V = (f"model.layers.0.self_attn.{name}_proj" for name in "qkv")
GATE, UP, DOWN = (f"model.layers.0.mlp.{name}_proj" for name in ("gate", "up", "down"))


def contents(folder):
    tensors = {}
    for name in os.listdir(folder):
        if name.endswith(".safetensors"):
            tensors |= load_file(os.path.join(folder, name))
    with open(os.path.join(folder, "config.json"), encoding="utf-8") as file:
        return tensors, json.load(file)["quantization_config"]


def of_layer(tensors, name):
    return {key.removeprefix(f"{name}."): each for key, each in tensors.items() if key.startswith(f"{name}.")}


def values(parts):
    """What a layer's codes stand for, by the layout of its scales alone."""
    weight, scale = parts["weight"].float(), parts["weight_scale"]
    if scale.dtype == torch.uint8:
        return weight * torch.exp2(scale.float() - 127).repeat_interleave(32, 1)
    if scale.ndim == 2 and scale.shape[1] > 1:
        return weight * scale.repeat_interleave(128, 0)[: weight.shape[0]].repeat_interleave(128, 1)
    return weight * scale


@pytest.mark.parametrize(
    "preset, strategy, scale, of_input",
    [
        ("FP8", "tensor", (torch.float32, (1,)), ("tensor", False)),
        ("FP8_DYNAMIC", "channel", (torch.float32, (256, 1)), ("token", True)),
        ("FP8_BLOCK", "block", (torch.float32, (2, 3)), ("group", True)),
        ("MXFP8", "group", (torch.uint8, (256, 12)), ("group", True)),
        ("W8A16", "channel", (torch.float32, (256, 1)), None),
    ],
)
def test_compressed_tensors(quantized, tmp_path, preset, strategy, scale, of_input):
    model, folder = quantized(wide_llama(), preset)
    tensors, config = contents(export(folder, tmp_path / "out"))
    group = config["config_groups"]["group_0"]
    assert config["quant_method"] == "compressed-tensors" and group["targets"] == ["Linear"]
    assert config["format"] == ("mxfp8-quantized" if preset == "MXFP8" else "float-quantized")
    assert group["weights"]["strategy"] == strategy
    inputs = group["input_activations"]
    assert (inputs and (inputs["strategy"], inputs["dynamic"])) == of_input
    assert set(config["ignore"]) == {"lm_head", "model.embed_tokens"} and config["kv_cache_scheme"] is None
    parts, layer = of_layer(tensors, DOWN), model.get_submodule(DOWN)
    assert (parts["weight"].dtype, tuple(parts["weight"].shape)) == (torch.float8_e4m3fn, (256, 384))
    assert (parts["weight_scale"].dtype, tuple(parts["weight_scale"].shape)) == scale
    assert torch.equal(values(parts), layer.weight.to(torch.float32)) or preset != "MXFP8"
    torch.testing.assert_close(values(parts), layer.weight.to(torch.float32), rtol=2**-8, atol=0)
    assert ("input_scale" in parts) == (preset == "FP8")


def test_a_model_is_exported_as_its_folder_is(quantized, tmp_path):
    model, folder = quantized(wide_llama(), "FP8_DYNAMIC")
    of_folder, of_model = (contents(export(each, tmp_path / str(n))) for n, each in enumerate((folder, model)))
    assert of_folder[1] == of_model[1] and of_folder[0].keys() == of_model[0].keys()
    pairs = [(tensor, of_model[0][key]) for key, tensor in of_folder[0].items()]
    assert all(torch.equal(one.view(torch.uint8), other.view(torch.uint8)) for one, other in pairs)


def test_several_files_and_what_stands_beside_them(quantized, tmp_path):
    model, folder = quantized(wide_llama(), "FP8_DYNAMIC")
    whole, _ = contents(export(folder, tmp_path / "whole"))
    model.save_pretrained(tmp_path / "parts", max_shard_size="300KB")
    (tmp_path / "parts" / "tokenizer.json").write_text("{}")
    out = export(tmp_path / "parts", tmp_path / "out")
    with open(os.path.join(out, "model.safetensors.index.json"), encoding="utf-8") as file:
        index = json.load(file)
    assert len(set(index["weight_map"].values())) > 2 and set(index["weight_map"]) == set(whole)
    assert index["metadata"]["total_size"] == sum(each.numel() * each.element_size() for each in whole.values())
    assert contents(out)[0].keys() == whole.keys() and os.path.isfile(os.path.join(out, "tokenizer.json"))


def test_fused_layers_share_the_largest_scale(quantized, tmp_path):
    plain = wide_llama()
    with torch.no_grad():
        plain.get_submodule(K).weight.mul_(9.0)
    model, folder = quantized(plain, "FP8")
    tensors, _ = contents(export(folder, tmp_path / "out"))
    parts = {name: of_layer(tensors, name) for name in (Q, K, V)}
    largest = max(model.get_submodule(name).weight_scale.item() for name in parts)
    assert {each["weight_scale"].item() for each in parts.values()} == {largest}
    assert len({each["input_scale"].item() for each in parts.values()}) == 1
    assert torch.equal(parts[K]["weight"].view(torch.uint8), model.get_submodule(K).codes.view(torch.uint8))
    own = model.get_submodule(Q)
    expected = (own.codes.float() * own.weight_scale / largest).to(torch.float8_e4m3fn)
    assert torch.equal(parts[Q]["weight"].view(torch.uint8), expected.view(torch.uint8))


def test_a_cache_and_queries(quantized, tmp_path):
    model, folder = quantized(wide_llama(), "FP8_BLOCK", kv_cache=True, overrides=CALIBRATED_CACHE)
    tensors, config = contents(export(folder, tmp_path / "out"))
    assert config["kv_cache_scheme"] == {
        "num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True,
    }  # fmt: skip
    scales = {key: tuple(each.shape) for key, each in tensors.items() if key.endswith(("k_scale", "v_scale"))}
    assert scales == {f"model.layers.{n}.self_attn.{name}_scale": (1,) for n in range(2) for name in "kv"}
    assert not any("fp8_scales" in key for key in tensors)
    by_head = {"kv_cache": True, "attention": True, "attention_granularity": "head", "dataset": None}
    model, folder = quantized(wide_llama(), "FP8", name="heads", **by_head)
    with pytest.raises(FP8CheckpointError, match="cannot express .*p_scale.*without="):
        export(folder, tmp_path / "heads-out")
    assert not os.path.exists(tmp_path / "heads-out")
    tensors, config = contents(export(folder, tmp_path / "heads-out", without=["p_scale", "output_scale"]))
    assert config["kv_cache_scheme"]["strategy"] == "attn_head"
    shapes = {key.rpartition(".")[2]: tuple(each.shape) for key, each in tensors.items() if ".0.self_attn." in key}
    assert (shapes["q_scale"], shapes["k_scale"], shapes["v_scale"]) == ((4, 1, 1), (2, 1, 1), (2, 1, 1))


@pytest.mark.parametrize("preset", ["FP8", "FP8_BLOCK"])
def test_experts_one_by_one(quantized, tmp_path, preset):
    model, folder = quantized(wide_mixtral(), preset)
    tensors, config = contents(export(folder, tmp_path / "out"))
    place = "model.layers.0.block_sparse_moe"
    assert f"{place}.gate" in config["ignore"]
    experts = model.model.layers[0].mlp.experts
    for index in range(4):
        w1, w2, w3 = (of_layer(tensors, f"{place}.experts.{index}.{name}") for name in ("w1", "w2", "w3"))
        assert tuple(w1["weight"].shape) == tuple(w3["weight"].shape) == (384, 256) == tuple(w2["weight"].shape[::-1])
        if preset == "FP8":
            assert torch.equal(w1["weight_scale"], w3["weight_scale"]) and torch.equal(
                w1["input_scale"], w3["input_scale"]
            )
            inner = experts.intermediate_scale.reshape(-1)
            assert w2["input_scale"].item() == inner[index if inner.numel() > 1 else 0].item()
            assert w1["input_scale"].item() == experts.input_scale.reshape(-1)[0].item()


@pytest.mark.parametrize("preset, block, scale", [("FP8_BLOCK", [128, 128], (2, 3)), ("MXFP8", [1, 32], (256, 12))])
def test_fp8(quantized, tmp_path, preset, block, scale):
    _, folder = quantized(wide_llama(), preset)
    tensors, config = contents(export(folder, tmp_path / "out", "fp8"))
    assert config["weight_block_size"] == block and config["modules_to_not_convert"] == [
        "lm_head",
        "model.embed_tokens",
    ]
    assert tuple(tensors[f"{DOWN}.weight_scale_inv"].shape) == scale and f"{DOWN}.weight_scale" not in tensors


def test_schemes_that_differ_are_groups(quantized, tmp_path):
    _, folder = quantized(wide_llama(), "FP8_DYNAMIC", overrides={"down_proj": {"scale_method": "block_128"}})
    _, config = contents(export(folder, tmp_path / "out"))
    first, second = config["config_groups"]["group_0"], config["config_groups"]["group_1"]
    assert first["weights"]["strategy"] == "channel" and GATE in first["targets"]
    assert second["weights"]["strategy"] == "block" and set(second["targets"]) == {DOWN, DOWN.replace("0", "1")}


@pytest.mark.parametrize(
    "options, format, message",
    [
        ({"modules_to_not_convert": ["k_proj"]}, "compressed-tensors", "k_proj is not, but engines fuse them"),
        ({"overrides": {"up_proj": {"scale_method": "block_128"}}}, "compressed-tensors", "but scaled differently"),
        ({"kv_cache": True}, "compressed-tensors", "a cache in FP8 with no calibrated scales.*calibrate attention"),
        ({"fp8_config": "E5M2"}, "compressed-tensors", "float8_e5m2: quantize with fp8_config='E4M3'"),
        ({}, "fp8", "format='fp8' cannot express weights scaled per channel.*down_proj has.*FP8_BLOCK"),
    ],
)
def test_what_a_format_cannot_express_is_refused(quantized, tmp_path, options, format, message):
    _, folder = quantized(wide_llama(), "FP8_DYNAMIC", **options)
    with pytest.raises(FP8CheckpointError, match=message):
        export(folder, tmp_path / "out", format)
    assert sorted(os.listdir(tmp_path)) == ["native", "plain"]


def test_sizes_that_blocks_do_not_divide(quantized, tmp_path):
    _, folder = quantized(wide_llama(head_dim=40), "FP8_BLOCK")
    with pytest.raises(FP8CheckpointError, match="o_proj has 160 inputs, which blocks of 128 do not divide"):
        export(folder, tmp_path / "out")


def test_what_is_no_checkpoint_of_ours(tmp_path):
    wide_llama().save_pretrained(tmp_path / "plain")
    with pytest.raises(FP8CheckpointError, match="holds no FP8 checkpoint of optimum_fp8"):
        export(tmp_path / "plain", tmp_path / "out")
    with pytest.raises(FP8ConfigError, match="format='gguf' is not one to export to"):
        export(tmp_path / "plain", tmp_path / "out", "gguf")


def test_an_existing_folder_is_kept(quantized, tmp_path):
    _, folder = quantized(wide_llama(), "FP8_DYNAMIC")
    (tmp_path / "out").mkdir()
    with pytest.raises(FP8CheckpointError, match="exists: choose another folder"):
        export(folder, tmp_path / "out")


def test_what_is_no_converted_model_of_transformers(tmp_path):
    dynamic = FP8Config.preset("FP8_DYNAMIC")
    with pytest.raises(FP8StateError, match="not converted to FP8"):
        export(wide_llama(), tmp_path / "out")
    with pytest.raises(FP8StateError, match="in measuring state"):
        export(prepare(wide_llama(), FP8Config.preset("FP8")), tmp_path / "out")
    with pytest.raises(FP8CheckpointError, match="Sequential is no model of transformers"):
        export(convert(nn.Sequential(nn.Linear(4, 4)), dynamic), tmp_path / "out")
    with pytest.raises(FP8CheckpointError, match="nowhere is not a folder"):
        export(tmp_path / "nowhere", tmp_path / "out")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "without, message",
    [
        (["p_scal"], r"without=\['p_scal'\]: attention has no such scale in this checkpoint, only: none"),
        (["weight_scale"], r"without=\['weight_scale'\]: attention has no such scale"),
        ("p_scale", r"expected a list of names, \['p_scale'\]"),
    ],
)
def test_what_cannot_be_left_out(quantized, tmp_path, without, message):
    _, folder = quantized(wide_llama(), "FP8_DYNAMIC")
    with pytest.raises(FP8ConfigError, match=message):
        export(folder, tmp_path / "out", without=without)
    assert not os.path.exists(tmp_path / "out")
