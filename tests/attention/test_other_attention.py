"""Attention that is no softmax between two products: found, left as it is, and the report says why."""

from __future__ import annotations

import pytest
import torch
import transformers as hf
from attention_models import GQA, IDS, TEXT
from transformers.models.kimi_linear.modeling_kimi_linear import KimiLinearAttention

from optimum_fp8 import FP8Config, convert, prepare, quantization_report
from optimum_fp8.attention.detect import Kind, attention_kind
from optimum_fp8.attention.other_attention import why_other

LINEAR = "linear attention"
MODELS = {
    "qwen3_next": (
        hf.Qwen3NextForCausalLM,
        hf.Qwen3NextConfig(
            **GQA,
            head_dim=8,
            layer_types=["linear_attention", "full_attention"],
            linear_key_head_dim=8,
            linear_value_head_dim=8,
            linear_num_key_heads=2,
            linear_num_value_heads=4,
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=16,
            shared_expert_intermediate_size=16,
        ),
        {"layers.0.linear_attn": LINEAR},
    ),
    "rwkv": (
        hf.RwkvForCausalLM,
        hf.RwkvConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, attention_hidden_size=32, context_length=64),
        {"blocks.0.attention": LINEAR},
    ),
    "yoso": (
        hf.YosoForMaskedLM,
        hf.YosoConfig(**TEXT | {"num_hidden_layers": 1}, pad_token_id=0),
        {"layer.0.attention.self": "kernels of its own"},
    ),
    "nystromformer": (
        hf.NystromformerForMaskedLM,
        hf.NystromformerConfig(**TEXT | {"num_hidden_layers": 1}, num_landmarks=11, segment_means_seq_len=11),
        {"layer.0.attention.self": "an inverse"},
    ),
}


@pytest.mark.parametrize("family", MODELS)
def test_it_stays_as_it_is_and_shows(family):
    model_class, config, expected = MODELS[family]
    results, reasons = [], {}
    for attention in (False, True):
        torch.manual_seed(5)
        model = model_class(type(config)(**config.to_dict())).eval()
        beside = {"names": [r"self_attn$"]} if family == "qwen3_next" else {}  # which is softmax attention
        prepare(model, FP8Config(attention=attention, blocklist=beside))
        with torch.no_grad():
            model(IDS)
            results.append(convert(model)(IDS)[0])
        reasons = {row.name: row.reason for row in quantization_report(model).attention if not row.quantized}
    assert torch.equal(*results)
    for ending, reason in expected.items():
        assert [reason in why for name, why in reasons.items() if name.endswith(ending)] == [True], reasons


def test_a_name_alone_does_not_make_attention_linear():
    """Kimi Linear's full attention looks up its function by name."""
    assert why_other(KimiLinearAttention.__name__)
    with torch.device("meta"):
        assert attention_kind(KimiLinearAttention(hf.KimiLinearConfig(), 0)) is Kind.INTERFACE
