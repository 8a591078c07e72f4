"""Every way in which a model, a part of it, or what it is a part of leaves and comes back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from accelerate import Accelerator
from torch import nn

from optimum_fp8 import FP8Config, convert, quantization_report
from optimum_fp8.errors import FP8CheckpointError
from optimum_fp8.hf.parts import overrides_by_name
from optimum_fp8.modules import fp8_modules

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
TEXT = {**SIZES, "vocab_size": 64}
IDS, PIXELS = torch.arange(2, 10)[None], torch.randn(1, 3, 16, 16)
DYNAMIC = FP8Config(activation_scheme="dynamic")
MIXED = FP8Config(
    activation_scheme="dynamic",
    blocklist={"names": ["layers?.0.*(mlp|intermediate)"]},
    overrides={"q_proj|query": {"fp8_config": "E5M2"}, "layers?.1.*(fc|dense)": {"activation_scheme": "weight_only"}},
)


def llama() -> Any:
    return hf.LlamaForCausalLM(hf.LlamaConfig(**TEXT, tie_word_embeddings=False)).eval()


def clip() -> Any:
    text = {**TEXT, "max_position_embeddings": 16, "eos_token_id": 1, "bos_token_id": 0}
    vision = {**SIZES, "image_size": 16, "patch_size": 4}
    return hf.CLIPModel(hf.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).eval()


def encoder() -> Any:
    return hf.BertModel(hf.BertConfig(**TEXT)).eval()


def decoder() -> Any:
    return hf.BertLMHeadModel(hf.BertConfig(**TEXT, is_decoder=True, add_cross_attention=True)).eval()


@torch.no_grad()
def output(model: Any) -> torch.Tensor:
    name = type(model).__name__
    if "Vision" in name:
        return model(PIXELS)[0]
    if "CLIPModel" in name:
        return model(input_ids=IDS, pixel_values=PIXELS).logits_per_image
    if "EncoderDecoder" in name:
        return model(input_ids=IDS, decoder_input_ids=IDS).logits
    return model(IDS)[0]


def check(model: Any, load: type[Any], folder: Path, save: Any = None, expected: Any = None) -> Any:
    """Save `model`, or what `save` saves; what comes back computes what it, or `expected`, does, and is refused
    without the plugin's configuration."""
    (save or model.save_pretrained)(folder)
    again = load.from_pretrained(folder).eval()
    expected = model if expected is None else expected
    assert torch.allclose(output(again), output(expected), rtol=1e-5, atol=1e-6)
    assert set(fp8_modules(again)) == {n.replace("_orig_mod.", "") for n in fp8_modules(expected)} and fp8_modules(
        again
    )
    said = json.loads((folder / "config.json").read_text())
    for config in [said, *(part for part in said.values() if isinstance(part, dict))]:
        config.pop("quantization_config", None)
    (folder / "config.json").write_text(json.dumps(said))
    with pytest.raises(RuntimeError, match="mismatched"):
        load.from_pretrained(folder)
    return again


@pytest.mark.core
@pytest.mark.parametrize("config", [DYNAMIC, MIXED], ids=["dynamic", "mixed"])
def test_a_whole_and_its_parts(tmp_path, config):
    model = convert(clip(), config)
    check(model.text_model, hf.CLIPTextModel, tmp_path / "text")
    check(model.vision_model, hf.CLIPVisionModel, tmp_path / "vision")
    for number, (part, cls) in enumerate(
        [(model.text_model, hf.CLIPTextModel), (model.vision_model, hf.CLIPVisionModel)]
    ):
        again = check(model, cls, tmp_path / f"{number} from the whole", expected=part)
        schemes = {name: module.scheme for name, module in fp8_modules(part).items()}
        assert {name: module.scheme for name, module in fp8_modules(again).items()} == schemes
    again = check(model, hf.CLIPModel, tmp_path / "whole")
    assert len(quantization_report(again).quantized) == len(quantization_report(model).quantized)


def test_a_loaded_whole_gives_away_its_parts_too(tmp_path):
    convert(clip(), DYNAMIC).save_pretrained(tmp_path / "whole")
    again = hf.CLIPModel.from_pretrained(tmp_path / "whole").eval()
    check(again.text_model, hf.CLIPTextModel, tmp_path / "text")
    check(hf.CLIPTextModel.from_pretrained(tmp_path / "whole").eval(), hf.CLIPTextModel, tmp_path / "text again")


def test_a_base_model_and_what_is_around_it(tmp_path):
    model = convert(llama(), DYNAMIC)
    check(model.model, hf.LlamaModel, tmp_path / "base")
    inside = llama()
    convert(inside.model, DYNAMIC)
    check(inside, hf.LlamaForCausalLM, tmp_path / "head")


def test_a_text_model_converted_inside_a_whole(tmp_path):
    model = clip()
    convert(model.text_model, DYNAMIC)
    check(model, hf.CLIPModel, tmp_path / "whole")


@pytest.mark.parametrize("config", [DYNAMIC, MIXED], ids=["dynamic", "mixed"])
def test_a_composite_of_two_fp8_models(tmp_path, config):
    parts = {"encoder": convert(encoder(), config), "decoder": convert(decoder(), config)}
    model = hf.EncoderDecoderModel(**parts).eval()
    again = check(model, hf.EncoderDecoderModel, tmp_path / "composite")
    schemes = {name: module.scheme for name, module in fp8_modules(model).items()}
    assert {name: module.scheme for name, module in fp8_modules(again).items()} == schemes
    check(again, hf.EncoderDecoderModel, tmp_path / "again")
    check(again.encoder, hf.BertModel, tmp_path / "encoder")


def test_a_composite_of_one_fp8_model(tmp_path):
    model = hf.EncoderDecoderModel(encoder=encoder(), decoder=convert(decoder(), DYNAMIC)).eval()
    check(model, hf.EncoderDecoderModel, tmp_path / "composite")


def test_a_composite_converted_as_a_whole(tmp_path):
    model = convert(hf.EncoderDecoderModel(encoder=encoder(), decoder=decoder()).eval(), DYNAMIC)
    check(model, hf.EncoderDecoderModel, tmp_path / "composite")
    check(model.encoder, hf.BertModel, tmp_path / "encoder")


def test_parts_quantized_in_different_ways_are_refused(tmp_path):
    other = FP8Config(activation_scheme="weight_only")
    model = hf.EncoderDecoderModel(encoder=convert(encoder(), other), decoder=convert(decoder(), DYNAMIC))
    model.save_pretrained(tmp_path)
    with pytest.raises(FP8CheckpointError, match="encoder was quantized in another way than the rest"):
        hf.EncoderDecoderModel.from_pretrained(tmp_path)


def test_a_model_in_a_module_of_another_kind(tmp_path):
    """As libraries hold the models that they save one by one."""
    holder = nn.ModuleDict({"0": nn.ModuleDict({"auto_model": encoder()}), "1": nn.Linear(8, 8)})
    convert(holder, DYNAMIC)
    check(holder["0"]["auto_model"], hf.BertModel, tmp_path / "model")


@pytest.mark.parametrize("compiled", ["whole", "inside"])
def test_compiled_models(tmp_path, compiled):
    model = convert(llama(), DYNAMIC)
    if compiled == "inside":
        model.model = torch.compile(model.model, backend="eager")
        check(model, hf.LlamaForCausalLM, tmp_path / "fp8")
    else:
        outer = torch.compile(model, backend="eager")
        check(model, hf.LlamaForCausalLM, tmp_path / "fp8", outer.save_pretrained)


def test_the_savers_of_accelerate(tmp_path):
    model, accelerator = convert(llama(), DYNAMIC), Accelerator(cpu=True)

    def save_model(folder: Path) -> None:
        accelerator.save_model(model, folder)
        model.config.save_pretrained(folder)

    def with_state_dict(folder: Path) -> None:
        accelerator.unwrap_model(model).save_pretrained(folder, state_dict=accelerator.get_state_dict(model))

    check(model, hf.LlamaForCausalLM, tmp_path / "a", save_model)
    check(model, hf.LlamaForCausalLM, tmp_path / "b", with_state_dict)


def test_overrides_by_name():
    names = {"layers.0.q_proj": ["layers.0.q_proj", "model.layers.0.q_proj"], "layers.1.k": ["layers.1.k"]}
    overrides = {"q_proj": {"a": 1}, "^layers.1": {"b": 2}, "head": {"c": 3}}
    assert overrides_by_name(overrides, names, "text.") == {
        r"^(?:text\.layers\.0\.q_proj)$": {"a": 1},
        r"^(?:text\.layers\.1\.k)$": {"b": 2},
    }
