"""Model families with peculiarities of their own: loaded, quantized, saved and reloaded with tiny random weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf

from optimum_fp8 import FP8Config, quantization_report
from optimum_fp8.modules import fp8_modules

IDS = {"input_ids": torch.arange(2, 26).view(2, 12)}
PIXELS = {"pixel_values": torch.linspace(-1, 1, 2 * 3 * 32 * 32).view(2, 3, 32, 32)}
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT = SIZES | {"vocab_size": 64, "max_position_embeddings": 64, "num_key_value_heads": 2}
ENCODER = SIZES | {"image_size": 32, "patch_size": 8}
MOE = TEXT | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 8}

# family: (model class, its config, inputs, modules in FP8)
FAMILIES: dict[str, tuple[Any, Any, dict[str, torch.Tensor], int]] = {
    "qwen3": (hf.Qwen3ForCausalLM, hf.Qwen3Config(**TEXT, head_dim=8), IDS, 14),
    "gemma2": (hf.Gemma2ForCausalLM, hf.Gemma2Config(**TEXT, head_dim=8), IDS, 14),
    "phi3, fused projections": (hf.Phi3ForCausalLM, hf.Phi3Config(**TEXT, pad_token_id=0), IDS, 8),
    "qwen3_moe, fused experts": (hf.Qwen3MoeForCausalLM, hf.Qwen3MoeConfig(**MOE), IDS, 10),
    "gpt2, Conv1D": (hf.GPT2LMHeadModel, hf.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64), IDS, 8),
    "opt, biases": (
        hf.OPTForCausalLM,
        hf.OPTConfig(**TEXT, ffn_dim=48, word_embed_proj_dim=32),
        IDS,
        12,
    ),
    "bloom": (hf.BloomForCausalLM, hf.BloomConfig(hidden_size=32, n_layer=2, n_head=4, vocab_size=64), IDS, 8),
    "falcon, Linear subclass": (
        hf.FalconForCausalLM,
        hf.FalconConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, vocab_size=64),
        IDS,
        8,
    ),
    "bert": (hf.BertForMaskedLM, hf.BertConfig(**SIZES, vocab_size=64), IDS, 13),
    "t5, dtype of wo": (
        hf.T5ForConditionalGeneration,
        hf.T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4),
        IDS | {"decoder_input_ids": IDS["input_ids"]},
        28,
    ),
    "vit, dtype of the patch projection": (hf.ViTForImageClassification, hf.ViTConfig(**ENCODER), PIXELS, 13),
    "resnet, first convolution": (
        hf.ResNetForImageClassification,
        hf.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic"),
        PIXELS,
        5,
    ),
    "dinov2, renamed and split weights": (
        hf.Dinov2Model,
        hf.Dinov2Config(**ENCODER, use_swiglu_ffn=True, mlp_ratio=2),
        PIXELS,
        15,
    ),
    "siglip, attention pooling": (hf.SiglipVisionModel, hf.SiglipVisionConfig(**ENCODER), PIXELS, 16),
}


def quantized(folder: str, family: str) -> Any:
    model_class, _, inputs, _ = FAMILIES[family]
    config = FP8Config(dataset=[inputs] * 2, num_calibration_samples=4)
    return model_class.from_pretrained(folder, quantization_config=config, dtype=torch.bfloat16)


@torch.no_grad()
def output(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    cast = {key: value.to(model.dtype) if value.is_floating_point() else value for key, value in inputs.items()}
    return model(**cast)[0]


@pytest.mark.core
@pytest.mark.parametrize("family", FAMILIES)
def test_family(save, tmp_path, family):
    model_class, config, inputs, in_fp8 = FAMILIES[family]
    original = model_class(config).eval()
    folder = save(original)
    model = quantized(folder, family)
    report = quantization_report(model)
    assert len(report.quantized) == in_fp8, report
    assert all(module.codes.is_contiguous() for module in fp8_modules(model).values())  # as kernels want them
    assert model.dtype == torch.bfloat16

    found, expected = output(model, inputs), output(original, inputs)
    assert ((found - expected).float().norm() / expected.float().norm()).item() < 0.15
    model.save_pretrained(tmp_path / "fp8")
    reloaded = model_class.from_pretrained(tmp_path / "fp8")
    assert reloaded.dtype == torch.bfloat16 and len(quantization_report(reloaded).quantized) == in_fp8
    assert torch.equal(output(reloaded, inputs), found)
    plain = reloaded.dequantize()
    assert [type(module) for module in plain.modules()] == [type(module) for module in original.modules()]
    assert ((output(plain, inputs) - expected).float().norm() / expected.float().norm()).item() < 0.15


@pytest.mark.parametrize("family", FAMILIES)
def test_weight_only_computes_what_the_dequantized_model_computes(save, family):
    """Any difference would come from code that takes FP8 codes for values."""
    model_class, config, inputs, in_fp8 = FAMILIES[family]
    folder = save(model_class(config).eval(), torch.float32)
    model = model_class.from_pretrained(folder, quantization_config=FP8Config(activation_scheme="weight_only"))
    found = output(model, inputs)
    report = quantization_report(model)
    assert len(report.quantized) == in_fp8 and all(module.kernels for module in report.quantized)
    assert all(module.codes.is_contiguous() for module in fp8_modules(model).values())
    expected = output(model.dequantize(), inputs)
    assert ((found - expected).norm() / expected.norm()).item() < 1e-5
