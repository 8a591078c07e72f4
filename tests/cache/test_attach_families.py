"""Caches of many model families become FP8 and compute what a cache of rounded values computes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf
from cache.conftest import (
    SCALES,
    attention_modules,
    cache_of,
    calibrate,
    fp8_caches,
    layers_of,
    rounding_caches,
    tiny,
)

from optimum_fp8.cache import cache_record, in_fp8

IDS = {"input_ids": torch.arange(3, 25).view(2, 11)}
MEL = {"input_features": torch.linspace(-1, 1, 2 * 8 * 32).view(2, 8, 32)}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT = SIZES | TOKENS | {"vocab_size": 64, "num_key_value_heads": 2, "max_position_embeddings": 64}
MIXED = TEXT | {"head_dim": 8, "sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]}
MLA = TEXT | {"num_key_value_heads": 4, "q_lora_rank": 12, "kv_lora_rank": 16, "qk_rope_head_dim": 4}
MLA |= {"qk_nope_head_dim": 8, "v_head_dim": 8, "moe_intermediate_size": 24, "n_routed_experts": 4, "n_group": 1}
MLA |= {"topk_group": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 2}
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 64, "n_positions": 64}
ENCODED = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 2, "encoder_attention_heads": 4}
ENCODED |= {"decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "vocab_size": 64}
ENCODED |= TOKENS | {"decoder_start_token_id": 1}

# family: (model class, its config, inputs, layers that are cached in FP8, dtype)
FAMILIES: dict[str, tuple[Any, Any, dict[str, Any], dict[str, torch.Tensor], int]] = {
    "llama": (hf.LlamaForCausalLM, hf.LlamaConfig, TEXT, IDS, 2),
    "qwen3": (hf.Qwen3ForCausalLM, hf.Qwen3Config, TEXT | {"head_dim": 8}, IDS, 2),
    "mistral, sliding": (hf.MistralForCausalLM, hf.MistralConfig, TEXT | {"sliding_window": 5}, IDS, 2),
    "gemma2, hybrid, soft cap": (hf.Gemma2ForCausalLM, hf.Gemma2Config, MIXED, IDS, 2),
    "gemma3, hybrid": (hf.Gemma3ForCausalLM, hf.Gemma3TextConfig, MIXED, IDS, 2),
    "gpt_oss, sinks": (hf.GptOssForCausalLM, hf.GptOssConfig, MIXED | {"num_local_experts": 4}, IDS, 2),
    "deepseek_v3, MLA": (hf.DeepseekV3ForCausalLM, hf.DeepseekV3Config, MLA, IDS, 2),
    "gpt2": (hf.GPT2LMHeadModel, hf.GPT2Config, GPT | TOKENS, IDS, 2),
    "opt": (hf.OPTForCausalLM, hf.OPTConfig, TEXT | {"ffn_dim": 48, "word_embed_proj_dim": 32}, IDS, 2),
    "bloom": (
        hf.BloomForCausalLM,
        hf.BloomConfig,
        TOKENS | {"hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": 64},
        IDS,
        2,
    ),
    "falcon, one head of keys": (
        hf.FalconForCausalLM,
        hf.FalconConfig,
        SIZES | TOKENS | {"vocab_size": 64, "multi_query": True},
        IDS,
        2,
    ),
    "gptj": (hf.GPTJForCausalLM, hf.GPTJConfig, GPT | TOKENS | {"rotary_dim": 4}, IDS, 2),
    "gpt_neo, index by another name": (
        hf.GPTNeoForCausalLM,
        hf.GPTNeoConfig,
        SIZES
        | TOKENS
        | {"vocab_size": 64, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]},
        IDS,
        2,
    ),
    "qwen3_next, linear attention": (
        hf.Qwen3NextForCausalLM,
        hf.Qwen3NextConfig,
        TEXT
        | {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
        | {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
        | {"shared_expert_intermediate_size": 24, "layer_types": ["linear_attention", "full_attention"]},
        IDS,
        1,
    ),
    "falcon_h1, attention and state in one layer": (
        hf.FalconH1ForCausalLM,
        hf.FalconH1Config,
        TEXT | {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 4},
        IDS,
        2,
    ),
    "minimax, linear attention outside the cache's layers": (
        hf.MiniMaxForCausalLM,
        hf.MiniMaxConfig,
        TEXT | {"head_dim": 8, "num_local_experts": 4, "layer_types": ["linear_attention", "full_attention"]},
        IDS,
        1,
    ),
    "glm_moe_dsa, MLA with an indexer": (
        hf.GlmMoeDsaForCausalLM,
        hf.GlmMoeDsaConfig,
        MLA | {"index_topk": 4, "index_n_heads": 2, "index_head_dim": 8, "mlp_layer_types": ["dense", "sparse"]},
        IDS,
        2,
    ),
    "t5, cross": (
        hf.T5ForConditionalGeneration,
        hf.T5Config,
        {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
        | {"pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0},
        IDS,
        4,
    ),
    "bart, cross": (hf.BartForConditionalGeneration, hf.BartConfig, ENCODED, IDS, 4),
    "whisper, cross": (
        hf.WhisperForConditionalGeneration,
        hf.WhisperConfig,
        ENCODED | {"num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": 64, "num_hidden_layers": 1},
        MEL,
        4,
    ),
}
GREEDY = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}


def generated(model: Any, inputs: dict[str, torch.Tensor], **options: Any) -> Any:
    # Whisper's own takes the cache apart before it returns it.
    options = GREEDY | {"output_logits": True, "return_dict_in_generate": True} | options
    return hf.GenerationMixin.generate(model, **inputs, **options)


@pytest.mark.core
@pytest.mark.parametrize("scales", SCALES)
@pytest.mark.parametrize("family", FAMILIES)
def test_family(family, scales):
    model_class, config_class, options, inputs, count = FAMILIES[family]
    model = tiny(model_class, config_class, **options)
    calibrate(model, lambda: generated(model, inputs))
    plain = torch.stack(generated(model, inputs).logits)
    with rounding_caches(model, SCALES[scales]):
        expected = generated(model, inputs)
    with fp8_caches(model, SCALES[scales]):
        found = generated(model, inputs)
        records = [cache_record(module) for module in attention_modules(model).values()]
    layers = [layer for layer in layers_of(cache_of(found)) if in_fp8(layer)]
    assert len(layers) == count and all(layer.written for layer in layers)
    assert sum(record.layers > 0 for record in records) >= count and not any(record.refused for record in records)
    assert torch.equal(found.sequences, expected.sequences)
    logits, rounded = torch.stack(found.logits), torch.stack(expected.logits)
    torch.testing.assert_close(logits, rounded, atol=2e-5, rtol=1e-4)
    assert (logits - plain).abs().max() > 1e-3  # FP8 leaves a trace
    after = torch.stack(generated(model, inputs).logits)
    assert torch.equal(after, plain)  # nothing is left behind


def test_whispers_own_generate():
    model_class, config_class, options, inputs, _ = FAMILIES["whisper, cross"]
    model = tiny(model_class, config_class, **options)
    with rounding_caches(model, SCALES["dynamic"]):
        expected = model.generate(**inputs, **GREEDY, return_dict_in_generate=True)
    with fp8_caches(model, SCALES["dynamic"]):
        found = model.generate(**inputs, **GREEDY, return_dict_in_generate=True)
        assert all(cache_record(module).layers for module in attention_modules(model.model.decoder).values())
    assert torch.equal(found["sequences"], expected["sequences"])
