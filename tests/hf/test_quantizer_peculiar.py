"""Round trips of families that call layers from lists, read weights in helpers, call a module `….…_weight`, cache keys
alone, or whose files hold the weights of several layers in one, or call a weight by its module's name."""

from __future__ import annotations

import pytest
import torch
import transformers as hf
from grids import slow_but
from transformers.models.glm5_next.configuration_glm5_next import Glm5NextConfig
from transformers.models.qwen4_exp.configuration_qwen4_exp import Qwen4ExpTextConfig

from optimum_fp8 import FP8Config

IDS = torch.arange(3, 21).view(2, 9)
PIXELS = {"pixel_values": torch.linspace(-1, 1, 3 * 64 * 64).view(1, 3, 64, 64)}


def mask2former():
    stages = {"depths": [1, 1, 1, 1], "num_heads": [2, 2, 2, 2], "out_features": [f"stage{i}" for i in range(1, 5)]}
    swin = hf.SwinConfig(image_size=32, patch_size=4, embed_dim=16, window_size=2, **stages)
    sizes = {"feature_size": 32, "mask_feature_size": 32, "hidden_dim": 32, "dim_feedforward": 48, "num_queries": 5}
    layers = {"encoder_feedforward_dim": 48, "encoder_layers": 1, "decoder_layers": 2, "num_attention_heads": 4}
    config = hf.Mask2FormerConfig(**sizes, **layers, backbone_config=swin)
    return hf.Mask2FormerForUniversalSegmentation, config, PIXELS


def layoutlmv3():
    sizes = {"hidden_size": 36, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    image = {"input_size": 32, "patch_size": 8, "coordinate_size": 6, "shape_size": 6, "max_2d_position_embeddings": 64}
    config = hf.LayoutLMv3Config(**sizes, **image, vocab_size=64, max_position_embeddings=64)
    boxes = torch.zeros(2, 9, 4, dtype=torch.long)
    pixels = torch.linspace(-1, 1, 2 * 3 * 32 * 32).view(2, 3, 32, 32)
    inputs = {"input_ids": IDS, "bbox": boxes, "pixel_values": pixels}
    return hf.LayoutLMv3ForTokenClassification, config, inputs


def qwen4_exp():
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 16}
    linear = {"linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2}
    experts = {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "num_experts": 4}
    ngrams = {"ple_layer_ids": [1], "ple_embed_dim": 32, "ngram_vocab_size_base": 50, "heads_per_ngram": 2}
    indexer = {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 16}
    config = Qwen4ExpTextConfig(
        **(sizes | linear | experts | ngrams | indexer),
        num_key_value_heads=2,
        linear_num_value_heads=4,
        num_experts_per_tok=2,
        hc_count=2,
        hc_lowrank=8,
        make_ngram_vocab_size_divisible_by=8,
        split_ngram_parts=2,
        indexer_compress_ratio=2,
        layer_types=["linear_attention", "full_attention"],
        pad_token_id=0,
        eos_token_id=2,
    )
    return hf.Qwen4ExpForCausalLM, config, {"input_ids": IDS}


def glm5_next():
    """Caches keys beside values of size 0."""
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "kv_lora_rank": 8, "q_lora_rank": 16, "v_head_dim": 16}
    experts = {"moe_intermediate_size": 16, "n_routed_experts": 4, "num_experts_per_tok": 2}
    indexer = {"index_topk": 8, "index_head_dim": 16, "index_n_heads": 2, "index_kpool": 4}
    linear = {"linear_head_dim": 16, "linear_num_heads": 2}
    text = sizes | heads | experts | indexer | linear | {"qk_nope_head_dim": 16, "qk_rope_head_dim": 0}
    vision = {"depth": 1, "hidden_size": 32, "num_heads": 2, "image_size": 28, "out_hidden_size": 32}
    vision |= {"intermediate_size": 48, "projection_intermediate_size": 48}
    config = Glm5NextConfig(text_config=text | {"pad_token_id": 0}, vision_config=vision)
    return hf.Glm5NextForConditionalGeneration, config, {"input_ids": IDS}


def shieldgemma2():
    text = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 16}
    text |= {"num_attention_heads": 2, "num_key_value_heads": 1, "sliding_window": 8}
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    tokens = {"image_token_index": 60, "boi_token_index": 61, "eoi_token_index": 62, "yes_token_index": 5}
    config = hf.ShieldGemma2Config(
        text_config=text | {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2},
        vision_config=vision | {"image_size": 28, "patch_size": 14},
        **tokens,
        no_token_index=6,
        mm_tokens_per_image=4,
    )
    ids = torch.tensor([[2, 60, 60, 60, 60, 5, 7, 9]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": (ids == 60).long()}
    inputs["pixel_values"] = torch.linspace(-1, 1, 3 * 28 * 28).view(1, 3, 28, 28)
    return hf.ShieldGemma2ForImageClassification, config, inputs


def lara_mini():
    """Its files hold the weights of four layers one below the other, and only the layers tell where to cut."""
    linear = {"linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2}
    config = hf.LaraMiniConfig(
        **(linear | {"vocab_size": 64, "hidden_size": 32, "head_dim": 16, "num_hidden_layers": 2}),
        num_attention_heads=2,
        num_key_value_heads=1,
        linear_num_value_heads=4,
        layer_types=["linear_attention", "full_attention"],
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
        num_experts=4,
        num_experts_per_tok=2,
    )
    return hf.LaraMiniForCausalLM, config, {"input_ids": IDS}


def inkling2():
    """Its files call the weight of a layer `weight_proj`, without `.weight`."""
    sizes = {"vocab_size": 64, "unpadded_vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "d_rel": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    heads |= {f"swa_{name}": value for name, value in heads.items()}
    experts = {"moe_intermediate_size": 16, "n_routed_experts": 4, "num_experts_per_tok": 2}
    config = hf.Inkling2TextConfig(
        **sizes, **heads, **experts, layer_types=["hybrid", "hybrid_sliding"], rel_extent=64, eos_token_id=2
    )
    return hf.Inkling2ForCausalLM, config, {"input_ids": IDS}


CASES = [(mask2former, False), (layoutlmv3, False), (lara_mini, False), (inkling2, False)]
CASES += [(family, kv_cache) for family in (qwen4_exp, glm5_next, shieldgemma2) for kv_cache in (False, True)]


@pytest.mark.parametrize("family, kv_cache", slow_but(CASES, *CASES[:4], (qwen4_exp, True)))
def test_calibrated_while_loading_saved_and_reloaded(family, kv_cache, tmp_path):
    torch.manual_seed(0)
    model_class, config, inputs = family()
    model = model_class(config).eval()
    model.save_pretrained(tmp_path / "original")
    what = {"attention": True, "kv_cache": kv_cache}
    options = FP8Config(dataset=[inputs], **what, decode_steps=2, ignore_modules_wo_measures=True)
    quantized = model_class.from_pretrained(tmp_path / "original", quantization_config=options).eval()
    quantized.save_pretrained(tmp_path / "fp8")
    reloaded = model_class.from_pretrained(tmp_path / "fp8").eval()
    with torch.no_grad():
        expected, found, again = (each(**inputs)[0] for each in (model, quantized, reloaded))
    assert torch.equal(found, again)
    least = 0.85 if family is mask2former else 0.97  # its queries attend where its own masks exceed a threshold
    assert torch.cosine_similarity(expected.flatten(), found.flatten(), dim=0) > least
