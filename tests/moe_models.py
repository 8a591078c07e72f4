"""Tiny models with experts, one for each way in which transformers calls them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import transformers as hf

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 64}
TEXT = SIZES | {"max_position_embeddings": 64, "num_key_value_heads": 2, "pad_token_id": 0}
LOCAL = TEXT | {"num_local_experts": 4, "num_experts_per_tok": 2}
NAMED = TEXT | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
ROUTED = NAMED | {"n_routed_experts": 4, "num_key_value_heads": 4, "n_group": 1}
MLA = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}

# family: (model class, its config); each token goes to two of four experts
FAMILIES: dict[str, tuple[Callable[[Any], Any], Callable[[], Any]]] = {
    "mixtral": (hf.MixtralForCausalLM, lambda: hf.MixtralConfig(**LOCAL)),
    "qwen2_moe": (hf.Qwen2MoeForCausalLM, lambda: hf.Qwen2MoeConfig(**NAMED)),
    "qwen3_moe": (hf.Qwen3MoeForCausalLM, lambda: hf.Qwen3MoeConfig(**NAMED, head_dim=8)),
    "deepseek_v3": (
        hf.DeepseekV3ForCausalLM,
        lambda: hf.DeepseekV3Config(**ROUTED, **MLA, topk_group=1, first_k_dense_replace=0),
    ),
    "gpt_oss": (hf.GptOssForCausalLM, lambda: hf.GptOssConfig(**LOCAL, head_dim=8)),
    "llama4": (
        hf.Llama4ForCausalLM,
        lambda: hf.Llama4TextConfig(**LOCAL, intermediate_size_mlp=48, head_dim=8, interleave_moe_layer_step=1),
    ),
    "granitemoe": (hf.GraniteMoeForCausalLM, lambda: hf.GraniteMoeConfig(**LOCAL)),
    "jamba": (
        hf.JambaForCausalLM,
        lambda: hf.JambaConfig(
            **(TEXT | {"num_hidden_layers": 2}), num_experts=4, attn_layer_period=2,
            attn_layer_offset=0, expert_layer_period=2, expert_layer_offset=1,
        ),
    ),
    "dbrx": (
        hf.DbrxForCausalLM,
        lambda: hf.DbrxConfig(
            d_model=32, n_heads=4, n_layers=1, max_seq_len=64, vocab_size=64, pad_token_id=0,
            attn_config={"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8},
            ffn_config={"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
        ),
    ),
    "jetmoe": (hf.JetMoeForCausalLM, lambda: hf.JetMoeConfig(**LOCAL, kv_channels=8)),
    "olmoe": (hf.OlmoeForCausalLM, lambda: hf.OlmoeConfig(**(TEXT | {"num_experts": 4, "num_experts_per_tok": 2}))),
    "phimoe": (hf.PhimoeForCausalLM, lambda: hf.PhimoeConfig(**LOCAL)),
    "longcat_flash": (
        hf.LongcatFlashForCausalLM,
        lambda: hf.LongcatFlashConfig(
            hidden_size=32, num_layers=1, num_attention_heads=4, vocab_size=64, ffn_hidden_size=48, moe_topk=2,
            expert_ffn_hidden_size=24, n_routed_experts=4, zero_expert_num=2, head_dim=8, pad_token_id=0, **MLA,
        ),
    ),
}  # fmt: skip


def tiny_moe(family: str) -> Any:
    model_class, config = FAMILIES[family]
    return model_class(config()).eval()
