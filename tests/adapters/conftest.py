"""Adapters of peft's with random weights, and FP8 models on disk that they are merged into."""

from __future__ import annotations

import peft
import pytest
import torch
from hf.conftest import save  # noqa: F401  # fixture
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from optimum_fp8 import FP8Config

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def llama(**options):
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 96}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, **options)).bfloat16()


@pytest.fixture
def adapt(tmp_path):
    """Saves an adapter with random weights for a model on disk; returns its folder."""

    def make(folder, name="adapter", dtype=torch.float32, **options):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
        config = peft.LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": PROJECTIONS, **options})
        adapted = peft.get_peft_model(model, config)
        generator = torch.Generator().manual_seed(7)
        for key, parameter in adapted.named_parameters():
            if "lora_" in key:
                values = torch.randn(parameter.shape, generator=generator)
                values = 1 + values.abs() if "magnitude" in key else 0.05 * values
                parameter.data.copy_(values.to(dtype))
                parameter.data = parameter.data.to(dtype)
        adapted.save_pretrained(tmp_path / name)
        return tmp_path / name

    return make


@pytest.fixture
def quantized(tmp_path):
    """Quantizes what lies in a folder and saves it; returns the folder."""

    def make(folder, name="fp8", preset="FP8_DYNAMIC", **options):
        config = FP8Config.preset(preset, **options)
        model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
        model.save_pretrained(tmp_path / name)
        return tmp_path / name

    return make


def merged_by_peft(folder, adapter, output, **options):
    """What peft makes of a model on disk and an adapter, saved."""
    model = AutoModelForCausalLM.from_pretrained(folder, **{"dtype": "auto", **options})
    peft.PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(output)
    return output
