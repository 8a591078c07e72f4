"""Modules that a checkpoint of the same class never had are new to it; those that it lost are not."""

from __future__ import annotations

import json

import pytest
import torch
import transformers as hf
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from unsealed import unsealed

from optimum_fp8 import FP8Config, convert
from optimum_fp8.checkpoint.names import names_in_model
from optimum_fp8.errors import FP8CheckpointError
from optimum_fp8.modules import fp8_modules

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
CONFIG = FP8Config(activation_scheme="dynamic", quantize_lm_head=True)
IDS, PIXELS = torch.tensor([[1, 2, 3]]), torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def decoder():
    sizes = {"n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 16, "vocab_size": 64}
    return hf.GPT2LMHeadModel(hf.GPT2Config(**sizes, is_decoder=True, add_cross_attention=True))


def eyes_and_text(pooler: bool):
    return hf.VisionEncoderDecoderModel(encoder=eyes(pooler), decoder=decoder())


def text_and_text(pooler: bool):
    return hf.EncoderDecoderModel(encoder=text(pooler), decoder=decoder())


def eyes(pooler: bool):
    return hf.ViTModel(hf.ViTConfig(**SIZES, image_size=16, patch_size=8), add_pooling_layer=pooler)


def text(pooler: bool):
    return hf.BertModel(hf.BertConfig(**SIZES, vocab_size=64), add_pooling_layer=pooler)


# the model, what it takes, the module that is not always there
MODELS = {
    "eyes and text": (eyes_and_text, {"pixel_values": PIXELS, "decoder_input_ids": IDS}, "encoder.pooler.dense"),
    "text and text": (text_and_text, {"input_ids": IDS, "decoder_input_ids": IDS}, "encoder.pooler.dense"),
    "eyes": (eyes, {"pixel_values": PIXELS}, "pooler.dense"),
    "text": (text, {"input_ids": IDS}, "pooler.dense"),
}


@torch.no_grad()
def output(model, inputs):
    return model.eval()(**inputs)[0]


def without(folder, start: str, recorded: bool = True) -> None:
    """Take tensors out of a checkpoint, and what its record says of the modules."""
    path = folder / "model.safetensors"
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    if not recorded:
        record = json.loads(metadata["optimum_fp8"])
        del record["modules"]
        metadata["optimum_fp8"] = json.dumps(record)
    tensors = {key: value for key, value in load_file(path).items() if not key.startswith(start)}
    save_file(tensors, path, metadata=unsealed(metadata))


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_what_was_never_there_is_new(tmp_path, name, sharded):
    make, inputs, new = MODELS[name]
    model = make(pooler=False)
    model.save_pretrained(tmp_path / "plain")
    convert(model, CONFIG)
    model.save_pretrained(tmp_path / "fp8", max_shard_size="20KB" if sharded else "5GB")
    again, info = type(model).from_pretrained(tmp_path / "fp8", output_loading_info=True)
    _, plain = type(model).from_pretrained(tmp_path / "plain", output_loading_info=True)
    assert info["missing_keys"] == plain["missing_keys"], "transformers says just what it says in high precision"
    assert any(key.startswith(new) for key in info["missing_keys"])
    assert type(again.get_submodule(new)) is nn.Linear and 0 < again.get_submodule(new).weight.std() < 0.1
    assert fp8_modules(again).keys() == fp8_modules(model).keys()
    assert torch.equal(output(again, inputs), output(model, inputs))
    again.save_pretrained(tmp_path / "second")
    second, info = type(model).from_pretrained(tmp_path / "second", output_loading_info=True)
    assert not info["missing_keys"] and torch.equal(output(second, inputs), output(model, inputs))


@pytest.mark.parametrize("name", MODELS)
def test_what_was_there_is_lost(tmp_path, name):
    make, inputs, new = MODELS[name]
    model = convert(make(pooler=True), CONFIG)
    model.save_pretrained(tmp_path / "fp8")
    again = type(model).from_pretrained(tmp_path / "fp8")
    assert new in fp8_modules(again) and torch.equal(output(again, inputs), output(model, inputs))
    without(tmp_path / "fp8", new)
    with pytest.raises(FP8CheckpointError, match=rf"lacks \d tensors.*{new}"):
        type(model).from_pretrained(tmp_path / "fp8")


@pytest.mark.parametrize("name", MODELS)
def test_layers_are_lost_and_never_new(tmp_path, name):
    model = convert(MODELS[name][0](pooler=False), CONFIG)
    model.save_pretrained(tmp_path / "fp8")
    lost = next(name for name in fp8_modules(model) if ".0." in name)
    keys = names_in_model(model, load_file(tmp_path / "fp8" / "model.safetensors"))
    without(
        tmp_path / "fp8", next(key for key, name in keys.items() if name == f"{lost}.weight").removesuffix("weight")
    )
    with pytest.raises(FP8CheckpointError, match=rf"lacks \d tensors.*{lost}"):
        type(model).from_pretrained(tmp_path / "fp8")


def test_where_nothing_is_recorded_what_is_not_there_is_lost(tmp_path):
    model = convert(eyes_and_text(pooler=False), CONFIG)
    model.save_pretrained(tmp_path / "fp8")
    without(tmp_path / "fp8", "nothing", recorded=False)
    with pytest.raises(FP8CheckpointError, match=r"lacks \d tensors.*pooler.dense"):
        type(model).from_pretrained(tmp_path / "fp8")


def test_a_compiled_part_is_recorded_by_its_own_name(tmp_path):
    model = convert(text(pooler=True), CONFIG)
    model.pooler = torch.compile(model.pooler, backend="eager")
    model.save_pretrained(tmp_path / "fp8")
    without(tmp_path / "fp8", "pooler")
    with pytest.raises(FP8CheckpointError, match=r"lacks \d tensors.*pooler.dense"):
        type(model).from_pretrained(tmp_path / "fp8")
