"""Attention to chosen keys: in FP8 over those that the model's indexer chooses, which itself is not rounded."""

from __future__ import annotations

import sys

import pytest
import torch
import transformers as hf
from attention_models import IDS, TEXT

from optimum_fp8 import FP8Config, convert, dequantize, ops, prepare, quantization_report
from optimum_fp8.attention import attention_forward, scales_of
from optimum_fp8.cache import in_fp8
from optimum_fp8.errors import FP8NotAvailableError

MLA = TEXT | {
    **{"num_key_value_heads": 4, "pad_token_id": 0, "kv_lora_rank": 16, "q_lora_rank": 24, "qk_rope_head_dim": 8},
    **{"qk_nope_head_dim": 8, "v_head_dim": 12, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2},
    **{"moe_intermediate_size": 24, "topk_group": 1, "index_topk": 4, "index_n_heads": 2, "index_head_dim": 16},
}
BLOCKS = TEXT | {
    **{"num_key_value_heads": 2, "pad_token_id": 0, "head_dim": 8, "index_n_heads": 2, "index_head_dim": 8},
    **{"index_block_size": 2, "index_topk_blocks": 2, "index_local_blocks": 1, "num_local_experts": 4},
    **{"num_experts_per_tok": 2, "dense_intermediate_size": 48, "shared_intermediate_size": 24},
    **{"mlp_layer_types": ["dense", "sparse"], "layer_types": ["minimax_m3_sparse", "minimax_m3_sparse"]},
}
SPARSE = {
    "deepseek_v32": (hf.DeepseekV32ForCausalLM, hf.DeepseekV32Config(**MLA, first_k_dense_replace=1)),
    "glm_moe_dsa": (hf.GlmMoeDsaForCausalLM, hf.GlmMoeDsaConfig(**MLA, mlp_layer_types=["dense", "sparse"])),
    "minimax_m3_vl": (hf.MiniMaxM3VLForCausalLM, hf.MiniMaxM3VLTextConfig(**BLOCKS)),
}
O_PROJ = {"names": [r"layers\.0\.self_attn\.o_proj$"]}


def make(family):
    torch.manual_seed(4)
    model_class, config = SPARSE[family]
    model = model_class(type(config)(**config.to_dict())).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "embed" not in name:
                parameter.mul_(2.0)
    return model


@torch.no_grad()
def logits(model, **options):
    return model(IDS, **options).logits


def quantized(model, **options):
    prepare(model, FP8Config(allowlist=O_PROJ, **options))
    logits(model, use_cache=True)
    return convert(model)


def rounded(x, scale):
    return ops.cast_from_fp8(ops.cast_to_fp8(x, scale, torch.float8_e4m3fn, 448.0), scale, x.dtype)


@pytest.mark.core
@pytest.mark.parametrize("family", SPARSE)
def test_products_over_the_chosen_keys_are_in_fp8(family, monkeypatch):
    """An oracle that lets the model mask what it does not choose, and rounds in its eager attention by hand."""
    plain = make(family)
    plain.set_attn_implementation("eager")
    expected = logits(plain)
    measuring = prepare(make(family), FP8Config(attention=True, allowlist=O_PROJ))
    torch.testing.assert_close(logits(measuring), expected, atol=1e-5, rtol=1e-5)
    model = quantized(make(family), attention=True)
    found = logits(model)
    assert 1e-4 < (found - expected).norm() / expected.norm() < 0.2
    rows = quantization_report(model).attention
    assert len(rows) == 2 and all(row.quantized and row.kernels and not row.fallbacks for row in rows)

    oracle = quantized(make(family))
    oracle.set_attn_implementation("eager")
    scales = dict(zip(_attention(oracle), map(scales_of, _attention(model)), strict=True))
    modeling = sys.modules[type(oracle).__module__]
    eager = modeling.eager_attention_forward

    def rounding(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
        s, groups = scales[module], query.shape[1] // key.shape[1]
        q, k, v = (rounded(x, s[f"{name}_scale"]) for name, x in (("q", query), ("k", key), ("v", value)))
        k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
        scores = q @ k.mT * scaling + attention_mask
        output = rounded(scores.softmax(-1), s["p_scale"]) @ v
        return rounded(output, s["output_scale"]).transpose(1, 2), None

    monkeypatch.setattr(modeling, "eager_attention_forward", rounding)
    by_hand = logits(oracle)
    monkeypatch.setattr(modeling, "eager_attention_forward", eager)
    assert (found - by_hand).norm() < 0.1 * (found - expected).norm()


def _attention(model):
    return [module for name, module in model.named_modules() if name.endswith("self_attn")]


@pytest.mark.parametrize("family", ["deepseek_v32", "minimax_m3_vl"])
def test_over_an_fp8_cache_saved_and_dequantized(family, tmp_path):
    model = quantized(make(family), attention=True, kv_cache=True)
    cache = hf.DynamicCache(config=model.config)
    with torch.no_grad():
        steps = [model(IDS[:, part], past_key_values=cache).logits for part in (slice(0, 7), slice(7, 11))]
    assert all(in_fp8(layer) for layer in cache.layers)
    whole = logits(model, use_cache=True)
    # Latents out of the cache are rounded, those of a prompt are not: other keys may be chosen.
    assert (torch.cat(steps, 1) - whole).norm() < 0.15 * whole.norm()
    assert all(row.cached and row.activations == "static" for row in quantization_report(model).attention)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert torch.equal(logits(again, use_cache=True), whole)
    assert not any(row.activations for row in quantization_report(dequantize(model)).attention)
    assert torch.equal(logits(model), logits(dequantize(quantized(make(family)))))


def test_excluding_it_by_name_is_enough():
    model = quantized(make("deepseek_v32"), attention=True, blocklist={"names": ["self_attn$"]})
    assert torch.equal(logits(model), logits(quantized(make("deepseek_v32"))))


def test_indices_keep_the_keys_they_name():
    q, k, v = torch.randn(3, 1, 2, 3, 4).unbind()
    indices = torch.tensor([[[0], [2], [1]]])
    output, _ = attention_forward(torch.nn.Identity(), q, k, v, None, indices=indices)
    torch.testing.assert_close(output, v.transpose(1, 2)[:, [0, 2, 1]])
    causal = torch.full((1, 1, 3, 3), torch.finfo(q.dtype).min).triu(1)
    both = torch.tensor([[[0, 1], [0, 1], [0, 1]]])
    expected, _ = attention_forward(torch.nn.Identity(), q, k[:, :, :2], v[:, :, :2], causal[..., :2])
    found, _ = attention_forward(torch.nn.Identity(), q, k, v, causal, indices=both)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("indices", [torch.zeros(1), torch.zeros(1, 3, 2), torch.zeros(1, 2, 2, dtype=torch.int32)])
def test_indices_of_another_kind_are_refused(indices):
    q = torch.randn(1, 2, 3, 4)
    with pytest.raises(FP8NotAvailableError, match="'indices' .* expected integers"):
        attention_forward(torch.nn.Identity(), q, q, q, None, indices=indices)
