"""What no rule can know of configurations of some architectures."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import transformers as hf

_SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
_TEXT = _SIZES | {"vocab_size": 160, "max_position_embeddings": 64}
_DECODER = _TEXT | {"is_decoder": True, "add_cross_attention": True}
_PICTURE = _SIZES | {"image_size": 32, "patch_size": 8}
_SOUND = {"conv_dim": [32] * 3, "conv_stride": [5, 4, 2], "conv_kernel": [10, 4, 2], "num_conv_pos_embedding_groups": 4}


_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_ROPE_BY_KIND = {"full_attention": _ROPE, "sliding_attention": _ROPE}
_CHAMELEON = {"<image>": 150} | {f"IMGIMG{'ABCDEFGHIJ'[each]}Z": 100 + each for each in range(10)}
_EMU3 = {"<image>": 150, "<|extra_200|>": 151}
_EMU3 |= {f"<|visual token {each:06d}|>": 100 + each for each in range(32)}
_GEMMA4_VISION = _SIZES | {"model_type": "gemma4_vision", "head_dim": 8, "num_key_value_heads": 4}
_DORY = ["sliding_attention", "mlp", "full_attention", "mlp", "sliding_attention", "mlp"]
_GEMMA3N = {
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "intermediate_size": [64] * 4,
    "activation_sparsity_pattern": [0.95, 0.95, 0.0, 0.0],
}


def _shuffled(config: Any) -> int:
    """The width of Llama 4's pictures after pixels were shuffled into channels."""
    vision = config["vision_config"]
    return int(vision["hidden_size"] / vision["pixel_shuffle_ratio"] ** 2)


def _quarters(text: Any) -> list[int]:
    """As much of a head's rotary dimensions for each of four axes."""
    return [text["head_dim"] // 8] * 4


def _started(config: Any) -> Any:
    """A composed model needs to know with which token its decoder starts."""
    config.decoder_start_token_id, config.pad_token_id, config.eos_token_id = 1, 0, 2
    return config


# Composed of others: their defaults have no parts.
CONFIGS: dict[str, Callable[[], Any]] = {
    "encoder-decoder": lambda: _started(
        hf.EncoderDecoderConfig.from_encoder_decoder_configs(hf.BertConfig(**_TEXT), hf.BertConfig(**_DECODER))
    ),
    "vision-encoder-decoder": lambda: _started(
        hf.VisionEncoderDecoderConfig.from_encoder_decoder_configs(hf.ViTConfig(**_PICTURE), hf.BertConfig(**_DECODER))
    ),
    "speech-encoder-decoder": lambda: _started(
        hf.SpeechEncoderDecoderConfig.from_encoder_decoder_configs(
            hf.Wav2Vec2Config(**_SIZES, **_SOUND),
            hf.BertConfig(**_DECODER),
        )
    ),
    "vision-text-dual-encoder": lambda: hf.VisionTextDualEncoderConfig.from_vision_text_configs(
        hf.ViTConfig(**_PICTURE), hf.BertConfig(**_TEXT), projection_dim=32
    ),
}  # fmt: skip

# Fields that have to fit together in a way that names do not tell, by architecture or by class; dots lead inside.
FIELDS: dict[str, dict[str, Any]] = {
    "apertus1p5": {
        "image_token_offset": 100,
        "vision_config.codebook_size": 20,
        "audio_token_offset": 120,
        "audio_config.codebook_size": 20,
        "vision_config.base_channels": 32,
    },
    "aria": {"projector_patch_to_query_dict": {16: 4}},
    "autoformer": {"label_length": 4},
    "bamba": {"attn_layer_indices": [1]},
    "beit": {"num_hidden_layers": 4, "out_indices": [1, 2, 3, 4]},
    "blip-2": {"image_token_id": 150},
    "Blip2ForImageTextRetrieval": {"qformer_config.use_qformer_text_input": True},
    "blt": {"encoder_hash_byte_group_vocab": 100},
    "chameleon": {
        "image_token_id": 150,
        "vocabulary_map": _CHAMELEON,
        "vq_config.base_channels": 32,
        "vq_config.num_embeddings": 10,
    },
    "clvp": {"text_config.vocab_size": 256, "speech_config.vocab_size": 256},
    "cohere_compass": {"text_config.rope_parameters": _ROPE_BY_KIND},
    "cohere_compass_text": {"rope_parameters": _ROPE_BY_KIND},
    "dbrx": {"attn_config.rope_theta": 10000.0, "attn_config.clip_qkv": 8.0},
    "deepseek_ocr2": {
        "text_config.mlp_layer_types": ["dense", "sparse"],
        "vision_config.encoder_config.hidden_size": lambda c: c["vision_config"]["sam_config"]["downsample_channels"][
            -1
        ],
        "vision_config.encoder_config.num_attention_heads": 2,
        "vision_config.encoder_config.num_key_value_heads": 2,
    },
    "depth_pro": {
        "patch_size": 28,
        "intermediate_hook_ids": [1, 0],
        "image_model_config.image_size": 28,
        "patch_model_config.image_size": 28,
        "fov_model_config.image_size": 28,
    },
    "embedding_gemma2": {"vision_config": _GEMMA4_VISION, "image_token_id": 150},
    "gemma4": {"vision_config": _GEMMA4_VISION},
    "diffusion_gemma": {
        "text_config.num_experts": 4,
        "text_config.top_k_experts": 2,
        "text_config.moe_intermediate_size": 32,
    },
    "dory": {
        "n_input_layers": 2,
        "n_recurrent_layers": 2,
        "n_output_layers": 2,
        "num_hidden_layers": 6,
        "layer_types": _DORY,
    },
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "dpt": {"num_hidden_layers": 4, "backbone_out_indices": [0, 1, 2, 3]},
    "emu3": {
        "vocabulary_map": _EMU3,
        "vq_config.base_channels": 32,
        "vq_config.hidden_size": 128,
        "vq_config.codebook_size": 32,
        "image_token_id": 150,
    },
    "gemma3n_text": _GEMMA3N,
    "glm4v": {"text_config.head_dim": 64},
    "glm46v": {"text_config.head_dim": 64},
    "glm4v_text": {"head_dim": 64},
    "glm4v_moe": {"text_config.head_dim": 128},
    "glm4v_moe_text": {"head_dim": 128},
    "glm_image": {"text_config.head_dim": 64},
    "glm_image_text": {"head_dim": 64},
    "glmga": {"text_config.head_dim": 64},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "granite4_vision": {"deepstack_layer_map": [[-1, 0]], "spatial_target_layers": [1], "downsample_rate": "1/2"},
    "higgs_audio_v2": {"num_codebooks": 2, "codebook_size": 66},  # what it predicts, one of both, is an id of its text
    "hiera": {"decoder_hidden_size": 32, "decoder_depth": 1, "decoder_num_heads": 2},
    "hrm_text": {"num_layers_per_stack": 1, "num_hidden_layers": 8},
    "hunyuan_vl": {"text_config.rope_parameters.mrope_section": lambda config: _quarters(config["text_config"])},
    "hunyuan_vl_text": {"rope_parameters.mrope_section": lambda config: _quarters(config)},
    "instructblip": {"image_token_index": 150},
    "instructblipvideo": {"video_token_index": 150},
    "janus": {"vq_config.base_channels": 32},
    "kosmos-2": {"latent_query_num": 4},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "llama4": {
        "vision_config.intermediate_size": _shuffled,
        "vision_config.vision_output_dim": lambda config: config["vision_config"]["projector_output_dim"],
    },
    "lw_detr": {
        "projector_scale_factors": [1.0],
        "num_feature_levels": 1,
        "projector_in_channels": lambda config: [config["d_model"]],
    },
    "molmo2": {"adapter_config.vision_feature_layer": [1, 0]},
    "moonshine_streaming": {"num_key_value_heads": lambda config: config["num_attention_heads"]},
    "perceiver": {
        "num_latents": 16,
        "d_latents": 64,
        "num_self_attends_per_block": 2,
        "num_self_attention_heads": 4,
        "num_cross_attention_heads": 1,
    },
    "T5GemmaEncoderModel": {"is_encoder_decoder": False},
    "step3p7": {"text_config.sliding_window": 8},
    "t5gemma2_encoder": {"text_config.dropout_rate": 0.0},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "xmod": {"default_language": "en_XX"},
}
