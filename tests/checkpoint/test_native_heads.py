"""FP8 checkpoints loaded by another class of the same architecture: what is new is initialized in high precision."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

from optimum_fp8 import FP8Config, quantization_report
from optimum_fp8.errors import FP8CheckpointError
from optimum_fp8.modules import fp8_modules

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
CONFIGS = {
    "Bert": hf.BertConfig(**SIZES, vocab_size=64),
    "Roberta": hf.RobertaConfig(**SIZES, vocab_size=64),
    "Llama": hf.LlamaConfig(**SIZES, vocab_size=64),
    "ViT": hf.ViTConfig(**SIZES, image_size=16, patch_size=8),
}
CONFIG = FP8Config(activation_scheme="weight_only")


def checkpoint(model, folder: Path, config: FP8Config = CONFIG) -> Path:
    model.save_pretrained(folder / "plain")
    type(model).from_pretrained(folder / "plain", quantization_config=config).save_pretrained(folder / "fp8")
    return folder / "fp8"


# saved by, loaded by, a module that is new
PAIRS = [
    ("BertModel", "BertForMaskedLM", "cls.predictions.transform.dense"),
    ("BertForMaskedLM", "BertForSequenceClassification", "bert.pooler.dense"),
    ("BertForMaskedLM", "BertModel", "pooler.dense"),
    ("BertForQuestionAnswering", "BertForTokenClassification", "classifier"),
    ("RobertaForMaskedLM", "RobertaForSequenceClassification", "classifier.dense"),
    ("RobertaForSequenceClassification", "RobertaForMaskedLM", "lm_head.dense"),
    ("LlamaForCausalLM", "LlamaForSequenceClassification", "score"),
    ("LlamaForSequenceClassification", "LlamaForCausalLM", "lm_head"),
    ("LlamaForCausalLM", "LlamaModel", None),
    ("ViTForMaskedImageModeling", "ViTForImageClassification", "classifier"),
]


@pytest.mark.parametrize(("source", "target", "new"), PAIRS)
def test_what_is_new_is_initialized_and_all_else_is_loaded(tmp_path, source, target, new):
    config = next(config for name, config in CONFIGS.items() if source.startswith(name))
    folder = checkpoint(getattr(hf, source)(config), tmp_path)
    model, info = getattr(hf, target).from_pretrained(folder, output_loading_info=True)
    _, plain = getattr(hf, target).from_pretrained(tmp_path / "plain", output_loading_info=True)
    assert info["missing_keys"] == plain["missing_keys"], "transformers says just what it says in high precision"
    saved = load_file(folder / "model.safetensors")
    layers = {name: module for name, module in fp8_modules(model).items() if ".layer" in f".{name}"}
    assert len(layers) >= 12
    codes = [tensor[0].float() for tensor in saved.values() if tensor.dtype == torch.float8_e4m3fn]
    for module in layers.values():  # whatever it is called on disk
        assert any(torch.equal(module.codes.float(), each) for each in codes)
    if new is not None:
        module = model.get_submodule(new)
        assert type(module) is torch.nn.Linear and 0 < module.weight.std() < 0.1  # as transformers initializes it
        reasons = {row.name: row.reason for row in quantization_report(model).modules if not row.quantized}
        assert "checkpoint" in reasons[new]
    model.save_pretrained(tmp_path / "again")
    again = getattr(hf, target).from_pretrained(tmp_path / "again")
    assert fp8_modules(again).keys() == fp8_modules(model).keys()


@pytest.mark.parametrize("quantize_head", [False, True])
@pytest.mark.parametrize("name", ["BertForSequenceClassification", "LlamaForSequenceClassification"])
def test_another_number_of_labels(tmp_path, name, quantize_head):
    model_class = getattr(hf, name)
    config = CONFIGS[name.partition("For")[0]]
    folder = checkpoint(model_class(config), tmp_path, CONFIG.replace(quantize_lm_head=quantize_head))
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        model_class.from_pretrained(folder, num_labels=7)
    model = model_class.from_pretrained(folder, num_labels=7, ignore_mismatched_sizes=True)
    head = model.get_submodule("classifier" if name.startswith("Bert") else "score")
    assert type(head) is torch.nn.Linear and head.weight.shape == (7, 32) and 0 < head.weight.std() < 0.1
    assert len(fp8_modules(model)) >= 12


@pytest.mark.parametrize("lost", ["model.layers.1.mlp.up_proj", "model.layers.0.self_attn.q_proj"])
@pytest.mark.parametrize("name", ["LlamaForCausalLM", "LlamaForSequenceClassification"])
def test_what_a_checkpoint_has_lost_is_not_new(tmp_path, name, lost):
    folder = checkpoint(hf.LlamaForCausalLM(CONFIGS["Llama"]), tmp_path)
    path = folder / "model.safetensors"
    tensors = {key: value for key, value in load_file(path).items() if not key.startswith(lost)}
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(FP8CheckpointError, match=f"lacks 2 tensors.*{lost}.*quantize the original model"):
        getattr(hf, name).from_pretrained(folder)
