"""Models in FP8 on disk, to be exported."""

from __future__ import annotations

import pytest
import torch
from hf.conftest import batches, ids, save  # noqa: F401  # fixtures
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from optimum_fp8 import FP8Config

SIZES = {"hidden_size": 256, "intermediate_size": 384, "num_hidden_layers": 2, "vocab_size": 96}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
CALIBRATED_CACHE = {"self_attn$": {"activation_scheme": "static", "scale_method": "full_range"}}


def wide_llama(**more):
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, **HEADS, **more)).bfloat16()


def wide_mixtral():
    torch.manual_seed(0)
    config = MixtralConfig(**SIZES, **HEADS, num_local_experts=4, num_experts_per_tok=2)
    return MixtralForCausalLM(config).bfloat16()


@pytest.fixture
def quantized(tmp_path):
    """Quantizes a model while loading it, saves it, and returns both it and the folder."""

    def make(model, preset, name="native", **options):
        plain = tmp_path / "plain"
        model.save_pretrained(plain)
        if preset == "FP8" or options.get("overrides") == CALIBRATED_CACHE:
            torch.manual_seed(1)
            options["dataset"] = [{"input_ids": torch.randint(0, 96, (4, 16))}]
        config = FP8Config.preset(preset, **options)
        converted = type(model).from_pretrained(plain, quantization_config=config).eval()
        converted.save_pretrained(tmp_path / name)
        return converted, tmp_path / name

    return make
