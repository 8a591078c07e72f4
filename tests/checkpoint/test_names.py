"""Models whose tensors transformers calls otherwise on disk than in memory: heads in FP8 are found by either name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers as hf
from grids import slow_but
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from unsealed import unsealed

from optimum_fp8 import FP8Config, calibrate, convert, prepare, quantization_report
from optimum_fp8.checkpoint.names import names_in_model
from optimum_fp8.errors import FP8CheckpointError
from optimum_fp8.modules import fp8_modules

LAYERS = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
EYES = {**LAYERS, "image_size": 16, "patch_size": 8}
TEXT = {**LAYERS, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 64}
IMAGE = 5
INPUTS = {
    "input_ids": torch.tensor([[IMAGE] * 4 + [7, 9, 11, 13]]),
    "pixel_values": torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0)),
}
HEAD, ON_DISK = "lm_head", "language_model.lm_head"
STATIC = FP8Config(activation_scheme="static", quantize_lm_head=True, dataset=[INPUTS])
DYNAMIC = FP8Config(activation_scheme="dynamic", quantize_lm_head=True)


def llava(**options):
    parts = {"vision_config": hf.CLIPVisionConfig(**EYES), "text_config": hf.LlamaConfig(**TEXT, **options)}
    return hf.LlavaForConditionalGeneration(hf.LlavaConfig(**parts, image_token_index=IMAGE, **options))


def paligemma(**options):
    eyes = hf.SiglipVisionConfig(**EYES, vision_use_head=False)
    parts = {"vision_config": eyes, "text_config": hf.GemmaConfig(**TEXT, **options), "projection_dim": 32}
    return hf.PaliGemmaForConditionalGeneration(hf.PaliGemmaConfig(**parts, image_token_index=IMAGE, **options))


def gemma3(**options):
    eyes = hf.SiglipVisionConfig(**EYES, vision_use_head=False)
    parts = {"vision_config": eyes, "text_config": hf.Gemma3TextConfig(**TEXT, **options), "mm_tokens_per_image": 4}
    return hf.Gemma3ForConditionalGeneration(hf.Gemma3Config(**parts, image_token_id=IMAGE, **options))


MODELS = [llava, paligemma, gemma3]


def converted(model, folder, config):
    return convert(model, config) if config.dataset is None else convert(calibrate(prepare(model, config)))


def while_loading(model, folder, config):
    model.save_pretrained(folder / "plain")
    return type(model).from_pretrained(folder / "plain", quantization_config=config).eval()


@torch.no_grad()
def logits(model):
    return model(**INPUTS).logits


def saved(model, folder: Path) -> dict[str, torch.Tensor]:
    model.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("config", [STATIC, pytest.param(DYNAMIC, marks=pytest.mark.slow)], ids=["static", "dynamic"])
@pytest.mark.parametrize("way", [converted, while_loading])
@pytest.mark.parametrize("make", slow_but(MODELS, llava))
def test_a_head_in_fp8(tmp_path, make, way, config, tied):
    model = way(make(tie_word_embeddings=tied).eval(), tmp_path, config)
    assert HEAD in fp8_modules(model)
    tensors = saved(model, tmp_path / "fp8")
    # What was tied when it was loaded had no name on disk, and is saved by its own.
    assert f"{HEAD if tied and way is while_loading else ON_DISK}.weight_scale" in tensors
    again, info = type(model).from_pretrained(tmp_path / "fp8", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert fp8_modules(again).keys() == fp8_modules(model).keys()
    assert torch.equal(again.lm_head.codes.float(), model.lm_head.codes.float())
    assert torch.equal(logits(again), logits(model))
    saved(again, tmp_path / "second")
    assert torch.equal(logits(type(model).from_pretrained(tmp_path / "second")), logits(model))


@pytest.mark.parametrize("make", MODELS)
def test_a_head_in_high_precision(tmp_path, make):
    model = converted(make(tie_word_embeddings=False).eval(), tmp_path, DYNAMIC.replace(quantize_lm_head=False))
    assert f"{ON_DISK}.weight_scale" not in saved(model, tmp_path / "fp8")
    again = type(model).from_pretrained(tmp_path / "fp8")
    assert type(again.lm_head) is torch.nn.Linear and torch.equal(logits(again), logits(model))
    reasons = {row.name: row.reason for row in quantization_report(again).modules if not row.quantized}
    assert "kept in high precision" in reasons[HEAD] or "checkpoint" in reasons[HEAD]


BROKEN = {
    "no scale": (lambda tensors: tensors.pop(f"{ON_DISK}.weight_scale"), r"lacks 1 tensors.*lm_head.weight_scale"),
    "another dtype": (
        lambda tensors: tensors.update({f"{ON_DISK}.weight_scale": tensors[f"{ON_DISK}.weight_scale"].half()}),
        rf"{ON_DISK}.weight_scale is F16 in the checkpoint, expected F32",
    ),
    "no codes": (lambda tensors: tensors.pop(f"{ON_DISK}.weight"), r"lacks 1 tensors.*lm_head.weight"),
    "a static scale": (
        lambda tensors: tensors.update({f"{ON_DISK}.input_scale": torch.ones(1)}),
        rf"{ON_DISK}.input_scale is in the checkpoint, but its configuration has no such scale for lm_head",
    ),
}


@pytest.mark.parametrize("broken", BROKEN)
def test_a_damaged_head_is_refused(tmp_path, broken):
    change, message = BROKEN[broken]
    model = converted(llava(tie_word_embeddings=False), tmp_path, DYNAMIC)
    tensors = saved(model, tmp_path / "fp8")
    change(tensors)
    path = tmp_path / "fp8" / "model.safetensors"
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    save_file(tensors, path, metadata=unsealed(metadata))
    with pytest.raises(FP8CheckpointError, match=message):
        type(model).from_pretrained(tmp_path / "fp8")


def test_the_names():
    model = llava()
    keys = [f"{ON_DISK}.weight", "vision_tower.x.weight_scale", "model.language_model.norm.weight", "lm_head.weight"]
    assert names_in_model(model, keys) == dict(
        zip(keys, ["lm_head.weight", "model.vision_tower.x.weight_scale", *keys[2:]], strict=True)
    )
    assert names_in_model(torch.nn.Linear(2, 2), keys) == {key: key for key in keys}
