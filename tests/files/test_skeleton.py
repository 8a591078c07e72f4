"""Files quantized without the model, beside what from_pretrained and save_pretrained make of the same model."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
import transformers as hf
from files.conftest import CHANNELS, DYNAMIC, WEIGHT_ONLY, records, said, tensors
from hf.conftest import llama
from moe_models import tiny_moe
from tiny_models import tiny_bert, tiny_gpt2

from optimum_fp8 import FP8Config, quantize_files
from optimum_fp8.errors import FP8CheckpointError
from optimum_fp8.modules import fp8_modules
from optimum_fp8.modules.fused_experts import FP8FusedExperts
from optimum_fp8.scales import PerBlock, PerGroup, ScaleMethod, ScaleRule, register_method

TEXT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT |= {"num_key_value_heads": 2, "vocab_size": 64}
VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION |= {"image_size": 32, "patch_size": 16}


UNIT = {"activation_scheme": "static", "scale_method": "unit_scale"}


def moe():
    options = {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2, "head_dim": 16}
    return hf.Qwen3MoeForCausalLM(hf.Qwen3MoeConfig(**TEXT, **options))


def llava():
    text, vision = hf.LlamaConfig(**TEXT), hf.CLIPVisionConfig(**VISION)
    return hf.LlavaForConditionalGeneration(hf.LlavaConfig(text_config=text, vision_config=vision))


MODELS = {
    "llama": llama,
    "llama, tied": lambda: llama(tied=True),
    "gpt2": tiny_gpt2,
    "bert": tiny_bert,
    "vit": lambda: hf.ViTForImageClassification(hf.ViTConfig(**VISION)),
    "qwen3_moe": moe,
    "llava": llava,
}


def both(source, tmp_path, model_class, options, **more):
    """What the model writes, and what its files alone make."""
    model = model_class.from_pretrained(source, quantization_config=FP8Config(**options))
    model.save_pretrained(tmp_path / "with", **more)
    quantize_files(source, tmp_path / "without", FP8Config(**options), **more)
    return tmp_path / "with", tmp_path / "without"


@pytest.mark.parametrize(
    ("name", "options"),
    [*((name, WEIGHT_ONLY) for name in MODELS), *((name, CHANNELS) for name in ("llama, tied", "gpt2", "bert", "vit"))],
    ids=lambda value: value if isinstance(value, str) else value["activation_scheme"],
)
def test_equal_to_the_model_to_the_bit(save, tmp_path, name, options):
    model = MODELS[name]()
    source = save(copy.deepcopy(model), max_shard_size="30KB")
    expected, found = both(source, tmp_path, type(model), options, max_shard_size="30KB")
    assert said(found) == said(expected)
    assert records(found)[0] == records(expected)[0]
    one, other = tensors(found), tensors(expected)
    if name == "qwen3_moe":  # save_pretrained keeps experts together that were one tensor in memory
        one, other = ({key: each[1:] for key, each in folder.items()} for folder in (one, other))
    else:
        assert {path.name for path in found.iterdir()} == {path.name for path in expected.iterdir()}
        if (expected / "model.safetensors.index.json").exists():
            assert said(found, "model.safetensors.index.json") == said(expected, "model.safetensors.index.json")
    assert one == other
    loaded, info = type(model).from_pretrained(found, output_loading_info=True)
    assert not any(info.values()) and fp8_modules(loaded)


BLOCKS = ScaleMethod(
    "files_blocks",
    weight=ScaleRule(PerBlock(128, 128), "maxabs", "identity"),
    activation=ScaleRule(PerGroup(128), "maxabs", "identity"),
    dynamic_only=True,
)


@pytest.mark.parametrize(
    "options",
    [
        DYNAMIC | {"scale_method": BLOCKS.name},
        DYNAMIC | {"scale_method": "maxabs_arbitrary", "target": "gaudi2", "fp8_config": "E4M3"},
        {"activation_scheme": "static", "scale_method": "unit_scale"},  # which needs no data
        WEIGHT_ONLY | {"overrides": {"down_proj": {"fp8_config": "E5M2"}}, "blocklist": {"names": ["q_proj"]}},
        {"allowlist": {"types": ["Linear"], "names": []}, "modules_to_not_convert": ["model.layers.0"]},
        WEIGHT_ONLY | {"kv_cache": True},
        {},
    ],
    ids=["blocks", "gaudi2", "unit", "overrides", "lists", "kv_cache", "auto"],
)
def test_configurations(save, tmp_path, options):
    register_method(BLOCKS)
    model = llama(hidden_size=160, intermediate_size=288)  # blocks at the edges are smaller
    source = save(model, torch.float16 if "target" in options else torch.float32)
    expected, found = both(source, tmp_path, hf.LlamaForCausalLM, options)
    assert tensors(found) == tensors(expected)
    assert said(found) == said(expected) and records(found) == records(expected)


@pytest.mark.core
def test_what_is_loaded_computes_the_same(save, tmp_path, ids):
    source = save(llama())
    for folder in both(source, tmp_path, hf.LlamaForCausalLM, DYNAMIC):
        logits = hf.LlamaForCausalLM.from_pretrained(folder)(ids).logits
        if folder.name == "with":
            expected = logits
    assert torch.equal(logits, expected)
    high = hf.LlamaForCausalLM.from_pretrained(source)(ids).logits
    assert 0 < float((logits - high).detach().norm() / high.detach().norm()) < 0.1


def test_the_dtype_that_is_asked_for(save, tmp_path):
    source = save(llama(), torch.float32)
    model = hf.LlamaForCausalLM.from_pretrained(
        source, quantization_config=FP8Config(**WEIGHT_ONLY), dtype=torch.bfloat16
    )
    model.save_pretrained(tmp_path / "with")
    quantize_files(source, tmp_path / "without", FP8Config(**WEIGHT_ONLY), dtype="bfloat16")
    assert tensors(tmp_path / "without") == tensors(tmp_path / "with")
    assert said(tmp_path / "without") == said(tmp_path / "with")


def test_names_of_older_files_are_those_that_the_model_gives(save, tmp_path):
    model = hf.LlamaForCausalLM(llama().config)
    base = save(model.model, name="base")  # without the prefix of the base model
    expected, found = both(base, tmp_path, hf.LlamaModel, WEIGHT_ONLY)
    assert tensors(found) == tensors(expected) and "layers.0.mlp.up_proj.weight_scale" in tensors(found)


@pytest.mark.core
def test_weights_that_loading_puts_together_stay_and_are_named(save, tmp_path, caplog):
    config = hf.Dinov2Config(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14, use_swiglu_ffn=True
    )
    source = save(hf.Dinov2Model(config))
    assert any("weights_in" in name for name in tensors(source)), "the files have gate and up in one tensor"
    with caplog.at_level(logging.WARNING, "optimum_fp8"):
        report = quantize_files(source, tmp_path / "fp8", FP8Config(**WEIGHT_ONLY))
    assert "2 modules stay in high precision" in caplog.text and "mlp.gate_proj" in caplog.text
    assert not any("gate_proj" in name for name in report.layers)
    assert any("gate_proj" in name for name in report.kept) and any("q_proj" in name for name in report.layers)
    original = tensors(source)
    stays = {key: each for key, each in tensors(tmp_path / "fp8").items() if "weights_in" in key}
    assert stays and all(each[1:] == original[key][1:] for key, each in stays.items())
    model, info = hf.Dinov2Model.from_pretrained(tmp_path / "fp8", output_loading_info=True)
    assert not any(info.values()) and len(fp8_modules(model)) == len(report.layers)
    pixels = torch.linspace(-1, 1, 3 * 28 * 28).view(1, 3, 28, 28).bfloat16()
    high = hf.Dinov2Model.from_pretrained(source)(pixels).last_hidden_state
    assert float((model(pixels).last_hidden_state - high).detach().norm() / high.detach().norm()) < 0.1


@pytest.mark.parametrize("options", [WEIGHT_ONLY, UNIT], ids=["weight_only", "unit_scale"])
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "dbrx", "jetmoe"])
def test_experts_are_those_of_the_model_to_the_bit(save, tmp_path, family, options):
    model = tiny_moe(family)
    expected, found = both(save(model), tmp_path, type(model), options)
    assert said(found) == said(expected)
    one, other = ({key: each[1:] for key, each in tensors(folder).items()} for folder in (found, expected))
    assert one == other
    again, info = type(model).from_pretrained(found, output_loading_info=True)
    assert not any(info.values()) and any(isinstance(module, FP8FusedExperts) for module in again.modules())


def test_tensors_that_the_files_lack_are_not_made_up(save, tmp_path):
    source = save(llama().model)
    config = tmp_path / "model" / "config.json"
    config.write_text(config.read_text().replace("LlamaModel", "LlamaForCausalLM"))
    with pytest.raises(FP8CheckpointError, match="holds nothing for lm_head.weight"):
        quantize_files(source, tmp_path / "fp8", FP8Config(**WEIGHT_ONLY))
    assert not (tmp_path / "fp8").exists()


@pytest.mark.parametrize("name", ["wav2vec2", "bit"])
def test_weights_that_follow_from_others_stay_in_high_precision(save, tmp_path, name, caplog):
    """Weight normalization, and weights that are standardized in every call: that takes the model."""
    if name == "bit":
        sizes = {"embedding_size": 32, "hidden_sizes": [32, 64], "depths": [1, 1], "num_groups": 4}
        model = hf.BitForImageClassification(hf.BitConfig(**sizes))
        derived = [key for key, module in model.named_modules() if type(module).__name__ == "WeightStandardizedConv2d"]
        config = FP8Config(**WEIGHT_ONLY, quantize_lm_head=True)
    else:
        sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 32}
        sizes |= {"conv_dim": [16, 16], "conv_stride": [2, 2], "conv_kernel": [3, 3], "num_feat_extract_layers": 2}
        model = hf.Wav2Vec2Model(hf.Wav2Vec2Config(**sizes, num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=4))
        derived, config = ["encoder.pos_conv_embed.conv"], FP8Config(**WEIGHT_ONLY)
    source = save(model)
    quantize_files(source, tmp_path / "fp8", config)
    count = len(derived) - (name == "bit")  # whose first convolution tells the dtype, and stays anyway
    assert f"{count} modules stay in high precision" in caplog.text
    again = type(model).from_pretrained(tmp_path / "fp8")
    assert fp8_modules(again) and not set(derived) & set(fp8_modules(again))
    for key in derived:
        assert torch.equal(again.get_submodule(key).weight.float(), model.get_submodule(key).weight.float())
