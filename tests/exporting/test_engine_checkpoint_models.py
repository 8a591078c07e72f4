"""Exporting models that see or hear, and such with tied heads: all goes along, or an error says what cannot."""

from __future__ import annotations

import json
import os

import pytest
import torch
from exporting.models_beyond_text import clip, llava, outputs_of, tied_llama, vit, whisper
from grids import slow_but
from safetensors.torch import load_file

from optimum_fp8 import FP8Config, export
from optimum_fp8.errors import FP8CheckpointError

MODELS = {"vit": vit, "clip": clip, "llava": llava, "whisper": whisper, "tied": tied_llama}
READ = ["vit", "clip", "llava", "tied"]  # by transformers, as `fp8`
PRESETS = {"compressed-tensors": "FP8_DYNAMIC", "fp8": "FP8_BLOCK", "modelopt": "FP8_DYNAMIC", "inc": "FP8"}
# Linear layers, but those that stay in high precision: classifiers and heads, and what is a convolution.
EYES = {
    "clip": ["vision_model", "visual_projection"],
    "llava": ["vision_tower"],
}  # which readers of ModelOpt's keep in high precision
LAYERS = {"vit": 12, "clip": 26, "llava": 28, "whisper": 16, "tied": 14}


@pytest.fixture
def saved(tmp_path):
    """Quantizes one of the models while loading it, and saves it with what stands beside weights."""

    def make(name, format, **options):
        model, batch = MODELS[name]()
        model.eval().save_pretrained(tmp_path / "plain")
        convolutions = [each for each, module in model.named_modules() if "Conv" in type(module).__name__]
        options.setdefault("modules_to_not_convert", convolutions)
        if format == "inc":
            options |= {"dataset": [batch], "scale_method": "maxabs_pow2"}
        config = FP8Config.preset(PRESETS[format], **options)
        quantized = type(model).from_pretrained(tmp_path / "plain", quantization_config=config).eval()
        quantized.save_pretrained(tmp_path / "native")
        (tmp_path / "native" / "preprocessor_config.json").write_text("{}")
        return model, quantized, batch, tmp_path / "native"

    return make


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("format", ["compressed-tensors", "modelopt"])
def test_every_layer_is_there_and_the_rest_is_as_it_was(saved, tmp_path, name, format):
    eyes = EYES.get(name) if format == "modelopt" else None
    options = {"modules_to_not_convert": eyes} if eyes else {}
    _, _, _, folder = saved(name, format, **options)
    out = export(folder, tmp_path / "out", format)
    before, after = (load_file(os.path.join(each, "model.safetensors")) for each in (folder, out))
    codes = {key for key, each in after.items() if each.dtype == torch.float8_e4m3fn}
    assert len(codes) == LAYERS[name] - ({"clip": 13, "llava": 12}[name] if eyes else 0)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before if not key.endswith("scale") and key not in codes)
    assert os.path.isfile(os.path.join(out, "preprocessor_config.json"))


@pytest.mark.parametrize("name", READ)
def test_transformers_computes_what_we_do(saved, tmp_path, name):
    plain, quantized, batch, folder = saved(name, "fp8")
    out = export(folder, tmp_path / "out", "fp8")
    theirs, info = type(plain).from_pretrained(out, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    original, ours = outputs_of(plain, batch), outputs_of(quantized, batch)
    error = (outputs_of(theirs, batch) - original).norm()
    assert 0 < error < 1.5 * (ours - original).norm()


def test_left_out_modules_have_the_names_on_disk_and_in_the_model(saved, tmp_path):
    """vLLM looks for the first, transformers for the second."""
    _, _, _, folder = saved("llava", "compressed-tensors", overrides={"mlp": {"scale_method": "block_128"}})
    with open(os.path.join(export(folder, tmp_path / "out"), "config.json"), encoding="utf-8") as file:
        said = json.load(file)["quantization_config"]
    assert {"language_model.lm_head", "lm_head"} <= set(said["ignore"])
    targets = {name for group in said["config_groups"].values() for name in group["targets"]}
    layer = "layers.0.self_attn.q_proj"
    assert {f"language_model.model.{layer}", f"model.language_model.{layer}"} <= targets


@pytest.mark.parametrize("name", slow_but(MODELS, "llava"))
def test_files_for_inc_name_the_modules_of_the_model(saved, tmp_path, name):
    model, _, _, folder = saved(name, "inc")
    with open(os.path.join(export(folder, tmp_path / "out", "inc"), "quant_config.json"), encoding="utf-8") as file:
        names = [each.strip("^$").replace("\\", "") for each in json.load(file)["allowlist"]["names"]]
    assert len(names) == LAYERS[name]
    assert {type(model.get_submodule(each)).__name__ for each in names} == {"Linear"}


@pytest.mark.parametrize("format", ["compressed-tensors", "fp8", "modelopt"])
def test_a_patch_embedding_in_fp8_is_named(saved, tmp_path, format):
    """Engines' formats have the other layers of a ViT, and no convolution."""
    preset = {"scale_method": "full_range", "activation_scheme": "dynamic"} if format == "fp8" else {}
    _, _, _, folder = saved("vit", format, modules_to_not_convert=[], **preset)
    with pytest.raises(FP8CheckpointError, match=r"patch_embeddings\.projection has a weight of 4 dimensions"):
        export(folder, tmp_path / "out", format)
    assert sorted(os.listdir(tmp_path)) == ["native", "plain"]


def test_a_patch_embedding_goes_to_inc(saved, tmp_path):
    model, _, _, folder = saved("vit", "inc", modules_to_not_convert=[])
    with open(os.path.join(export(folder, tmp_path / "out", "inc"), "quant_config.json"), encoding="utf-8") as file:
        names = [each.strip("^$").replace("\\", "") for each in json.load(file)["allowlist"]["names"]]
    assert len(names) == LAYERS["vit"] + 1
    assert [type(model.get_submodule(each)).__name__ for each in names].count("Conv2d") == 1


@pytest.mark.parametrize(
    "name, format, options, message",
    [
        ("clip", "modelopt", {}, "a layer of vision_model in FP8, which readers .* which vision_model.encoder.* has"),
        ("llava", "modelopt", {}, "a layer of vision_tower in FP8, .*list 'vision_tower' in modules_to_not_convert"),
        ("whisper", "inc", {"modules_to_not_convert": []}, "a weight of Conv1d, which model.encoder.conv2 has"),
    ],
)
def test_what_cannot_be_expressed_is_named(saved, tmp_path, name, format, options, message):
    _, _, _, folder = saved(name, format, **options)
    with pytest.raises(FP8CheckpointError, match=message):
        export(folder, tmp_path / "out", format)
    assert sorted(os.listdir(tmp_path)) == ["native", "plain"]
