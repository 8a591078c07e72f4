"""Tiny random models of many families, for tests of attention: class, configuration, inputs.

Two layers where that is possible, an odd number of tokens, and a left-padded row where the model takes a mask.
"""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
import transformers as hf


class Family(NamedTuple):
    """How to make a model and call it; `ours` is how many attention modules it has, `cached` how many of them cache."""

    model_class: Any
    config: Any
    inputs: dict[str, torch.Tensor]
    ours: int
    cached: int

    def make(self) -> Any:
        torch.manual_seed(3)
        model = self.model_class(copy.deepcopy(self.config)).eval()  # conversions leave their mark on it
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.ndim > 1 and "embed" not in name:  # random models attend to all alike: make them choose
                    parameter.mul_(2.0)
                if name.endswith("sinks"):
                    parameter.normal_()
        return model


IDS = torch.arange(3, 25).view(2, 11)
MASK = torch.ones(2, 11, dtype=torch.long)
MASK[1, :4] = 0
TOKENS = {"input_ids": IDS, "attention_mask": MASK}
UNPADDED = {"input_ids": IDS}
PIXELS = {"pixel_values": torch.linspace(-1, 1, 2 * 3 * 32 * 32).view(2, 3, 32, 32)}
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT = SIZES | {"vocab_size": 64, "max_position_embeddings": 64}
GQA = TEXT | {"num_key_value_heads": 2, "pad_token_id": 0}
SLIDING = {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]}
ENCODER = SIZES | {"image_size": 32, "patch_size": 8}
SEQ2SEQ = {"vocab_size": 64, "pad_token_id": 0, "decoder_start_token_id": 1, "eos_token_id": 2, "bos_token_id": 1}
DECODER = {"decoder_input_ids": IDS[:, :7]}

FAMILIES: dict[str, Family] = {
    "llama": Family(hf.LlamaForCausalLM, hf.LlamaConfig(**GQA), TOKENS, 2, 2),
    "qwen3": Family(hf.Qwen3ForCausalLM, hf.Qwen3Config(**GQA, head_dim=16), TOKENS, 2, 2),
    "mistral, sliding": Family(hf.MistralForCausalLM, hf.MistralConfig(**GQA, sliding_window=5), TOKENS, 2, 2),
    "gemma2, soft cap": Family(
        hf.Gemma2ForCausalLM,
        hf.Gemma2Config(**GQA, **SLIDING, head_dim=8, attn_logit_softcapping=2.0, query_pre_attn_scalar=16),
        TOKENS,
        2,
        2,
    ),
    "gemma3, hybrid": Family(hf.Gemma3ForCausalLM, hf.Gemma3TextConfig(**GQA, **SLIDING, head_dim=8), TOKENS, 2, 2),
    "gpt_oss, sinks": Family(
        hf.GptOssForCausalLM,
        hf.GptOssConfig(**GQA, **SLIDING, head_dim=8, num_local_experts=4, num_experts_per_tok=2),
        TOKENS,
        2,
        2,
    ),
    "deepseek_v3, latents": Family(
        hf.DeepseekV3ForCausalLM,
        hf.DeepseekV3Config(
            **TEXT,
            num_key_value_heads=4,
            pad_token_id=0,
            kv_lora_rank=16,
            q_lora_rank=24,
            qk_rope_head_dim=8,
            qk_nope_head_dim=8,
            v_head_dim=12,
            n_routed_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=24,
            n_group=2,
            topk_group=1,
            first_k_dense_replace=1,
        ),
        TOKENS,
        2,
        2,
    ),
    "gpt2": Family(
        hf.GPT2LMHeadModel, hf.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64, n_positions=64), TOKENS, 2, 2
    ),
    "opt": Family(hf.OPTForCausalLM, hf.OPTConfig(**TEXT, ffn_dim=48, word_embed_proj_dim=32), TOKENS, 2, 2),
    "bloom": Family(
        hf.BloomForCausalLM, hf.BloomConfig(hidden_size=32, n_layer=2, n_head=4, vocab_size=64), TOKENS, 2, 2
    ),
    "falcon": Family(
        hf.FalconForCausalLM,
        hf.FalconConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, vocab_size=64),
        TOKENS,
        2,
        2,
    ),
    "falcon, alibi": Family(
        hf.FalconForCausalLM,
        hf.FalconConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, vocab_size=64, alibi=True),
        TOKENS,
        2,
        2,
    ),
    "gptj": Family(
        hf.GPTJForCausalLM,
        hf.GPTJConfig(n_embd=32, n_layer=2, n_head=4, rotary_dim=4, vocab_size=64, n_positions=64),
        TOKENS,
        2,
        2,
    ),
    "mpt": Family(
        hf.MptForCausalLM,
        hf.MptConfig(d_model=32, n_heads=4, n_layers=2, vocab_size=64, max_seq_len=64, use_cache=True),
        TOKENS,
        2,
        2,
    ),
    "gpt_neo": Family(  # multiplies queries and keys in float32
        hf.GPTNeoForCausalLM,
        hf.GPTNeoConfig(
            hidden_size=32,
            num_layers=2,
            num_heads=4,
            vocab_size=64,
            max_position_embeddings=64,
            attention_types=[[["global", "local"], 1]],
            window_size=5,
        ),
        TOKENS,
        2,
        2,
    ),
    "bert": Family(hf.BertForMaskedLM, hf.BertConfig(**TEXT), TOKENS, 2, 0),
    "modernbert": Family(
        hf.ModernBertForMaskedLM, hf.ModernBertConfig(**TEXT, pad_token_id=0, local_attention=6), TOKENS, 2, 0
    ),
    "deberta_v2": Family(
        hf.DebertaV2ForMaskedLM,
        hf.DebertaV2Config(**TEXT, relative_attention=True, pos_att_type=["p2c", "c2p"], position_buckets=8),
        TOKENS,
        2,
        0,
    ),
    "t5": Family(
        hf.T5ForConditionalGeneration,
        hf.T5Config(**SEQ2SEQ, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4),
        TOKENS | DECODER,
        6,
        4,
    ),
    "bart": Family(
        hf.BartForConditionalGeneration,
        hf.BartConfig(
            **SEQ2SEQ,
            d_model=32,
            encoder_layers=1,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=48,
            decoder_ffn_dim=48,
            max_position_embeddings=64,
        ),
        TOKENS | DECODER,
        5,
        4,
    ),
    "whisper": Family(
        hf.WhisperForConditionalGeneration,
        hf.WhisperConfig(
            **SEQ2SEQ,
            d_model=32,
            encoder_layers=1,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=48,
            decoder_ffn_dim=48,
            num_mel_bins=8,
            max_source_positions=20,
            max_target_positions=40,
        ),
        {"input_features": torch.linspace(-1, 1, 2 * 8 * 40).view(2, 8, 40), **DECODER},
        5,
        4,
    ),
    "vit": Family(hf.ViTForImageClassification, hf.ViTConfig(**ENCODER), PIXELS, 2, 0),
    "clip": Family(
        hf.CLIPModel,
        hf.CLIPConfig(
            text_config=TEXT | {"eos_token_id": 2, "projection_dim": 32},
            vision_config=ENCODER | {"projection_dim": 32},
            projection_dim=32,
        ),
        TOKENS | PIXELS,
        4,
        0,
    ),
    "swin": Family(
        hf.SwinForImageClassification,
        hf.SwinConfig(image_size=32, patch_size=4, embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=4),
        PIXELS,
        4,
        0,
    ),
}


def all_attention_scales(model: Any) -> list[tuple[str, str, torch.Tensor]]:
    """Every attention module's name, the name of a scale of it, and the scale."""
    from optimum_fp8.attention import scales_of

    named = model.named_modules()
    return [(name, key, scale) for name, module in named for key, scale in scales_of(module).items()]
