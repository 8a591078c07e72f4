"""model_card: metadata that the hub reads, and what was made of the model."""

from __future__ import annotations

import pytest
import torch
from huggingface_hub import ModelCard
from tiny_models import tiny_bert, tiny_llama
from transformers import AutoModelForCausalLM

from optimum_fp8 import FP8Config, FP8ConfigError, FP8StateError, convert, export, merge_lora, model_card

DYNAMIC = FP8Config(activation_scheme="dynamic")


def test_metadata_and_tables():
    model = convert(tiny_llama().bfloat16(), DYNAMIC)
    model.name_or_path = "meta-llama/Llama-3.1-8B"
    text = model_card(model, {"perplexity": {"bfloat16": 20.24, "FP8": 20.31}, "accuracy": 0.5})
    data = ModelCard(text).data
    assert data.base_model == "meta-llama/Llama-3.1-8B" and data.library_name == "transformers"
    assert data.tags == ["fp8", "optimum-fp8", "quantized"] and data.to_dict()["base_model_relation"] == "quantized"
    assert data.pipeline_tag == "text-generation"
    assert "# meta-llama/Llama-3.1-8B, in FP8" in text
    assert "| `model.layers.*.mlp.down_proj` | Linear | 1 | 2,048 | FP8, dynamic |" in text
    assert "| `lm_head` | Linear | 1 | 2,048 | as it was: kept by default" in text
    assert "| perplexity | 20.24 | 20.31 |" in text and "| accuracy |  | 0.5 |" in text
    assert "none: no scale follows from data" in text and "optimum-cli fp8 export" in text


def test_no_path_is_told(tmp_path):
    tiny_llama().bfloat16().save_pretrained(tmp_path / "plain")
    config = FP8Config(dataset=[{"input_ids": torch.arange(32).reshape(2, 16)}])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", quantization_config=config)
    text = model_card(model)
    assert str(tmp_path) not in text and "base_model" not in text and "## Results" not in text
    assert "| calibration data | list, 2 samples, 32 tokens" in text
    assert ModelCard(model_card(model, base_model="me/mine")).data.base_model == "me/mine"


def test_what_was_done_since_is_told(tmp_path):
    model = convert(tiny_llama().bfloat16(), DYNAMIC)
    model.save_pretrained(tmp_path / "fp8")
    (tmp_path / "adapter").mkdir()
    name = "base_model.model.model.layers.0.mlp.up_proj.lora_"
    from safetensors.torch import save_file

    tensors = {f"{name}A.weight": torch.ones(2, 32), f"{name}B.weight": torch.ones(64, 2)}
    save_file(tensors, tmp_path / "adapter" / "adapter_model.safetensors")
    said = '{"peft_type": "LORA", "r": 2, "lora_alpha": 1}'
    (tmp_path / "adapter" / "adapter_config.json").write_text(said, encoding="utf-8")
    merge_lora(tmp_path / "fp8", tmp_path / "adapter", tmp_path / "merged", trained_on="fp8")
    text = model_card(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"))
    assert "| changed since | LoRA adapter merged (20" in text


def test_another_task():
    text = model_card(convert(tiny_bert().bfloat16(), DYNAMIC))
    assert "from transformers import BertForSequenceClassification" in text and "pipeline_tag" not in text


def test_what_has_no_card():
    with pytest.raises(FP8StateError, match="model_card: LlamaForCausalLM is not converted"):
        model_card(tiny_llama())
    with pytest.raises(FP8ConfigError, match="results=3: expected a mapping"):
        model_card(convert(tiny_llama().bfloat16(), DYNAMIC), 3)


def test_a_card_is_not_copied_to_what_is_made_of_the_checkpoint(tmp_path):
    model = convert(tiny_llama().bfloat16(), FP8Config.preset("FP8_DYNAMIC"))
    for name, card in (("ours", model_card(model)), ("theirs", "# Mine")):
        model.save_pretrained(tmp_path / name)
        (tmp_path / name / "README.md").write_text(card, encoding="utf-8")
        export(tmp_path / name, tmp_path / f"{name}-exported")
    assert not (tmp_path / "ours-exported" / "README.md").exists()
    assert (tmp_path / "theirs-exported" / "README.md").read_text(encoding="utf-8") == "# Mine"
