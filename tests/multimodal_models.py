"""Tiny random models that see or hear as well as read, and a batch of what their processors make, for calibration."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT = SIZES | {"vocab_size": 64, "max_position_embeddings": 64}
GQA = TEXT | {"num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 1}
SECTIONS = {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}}
IMAGE, VIDEO, START, END, AUDIO, HEAR, HEARD = 2, 3, 4, 5, 6, 7, 8  # tokens
EARS = {"encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 48, "d_model": 32, "num_mel_bins": 8}
EYES = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 4,
    "patch_size": 8,
    "out_hidden_size": 32,
    "window_size": 32,
    "fullatt_block_indexes": [1],
}
SPEECH = {
    "conv_dim": (16, 16),
    "conv_stride": (5, 2),
    "conv_kernel": (10, 3),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 2,
}

Made = tuple[Any, dict[str, torch.Tensor]]


def tokens(length: int, **places: tuple[int, int, int]) -> dict[str, torch.Tensor]:
    """Two rows of tokens, with `(token, begin, end)` in given places."""
    ids = torch.randint(10, 60, (2, length))
    for token, begin, end in places.values():
        ids[:, begin:end] = token
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def patches() -> dict[str, torch.Tensor]:
    """Two images of 4 x 4 patches, as Qwen's processors make them."""
    return {"pixel_values": torch.randn(32, 3 * 2 * 8 * 8), "image_grid_thw": torch.tensor([[1, 4, 4]] * 2)}


def siglip() -> Made:
    config = hf.SiglipConfig(text_config=TEXT, vision_config=SIZES | {"image_size": 32, "patch_size": 8})
    return hf.SiglipModel(config), {
        "input_ids": torch.randint(3, 60, (2, 12)),
        "pixel_values": torch.randn(2, 3, 32, 32),
    }


def voxtral() -> Made:
    ears = SIZES | {"intermediate_size": 128, "num_mel_bins": 8, "max_source_positions": 20}
    config = hf.VoxtralConfig(audio_config=ears, text_config=GQA | {"model_type": "llama"}, audio_token_id=AUDIO)
    batch = tokens(13, audio=(AUDIO, 2, 7)) | {"input_features": torch.randn(2, 8, 40)}
    return hf.VoxtralForConditionalGeneration(config), batch


def granite_speech() -> Made:
    ears = {"input_dim": 16, "num_layers": 2, "hidden_dim": 32, "feedforward_mult": 2, "num_heads": 4, "dim_head": 8}
    ears |= {"output_dim": 12, "context_size": 10, "max_pos_emb": 16, "conv_kernel_size": 3}
    between = TEXT | {"model_type": "blip_2_qformer", "encoder_hidden_size": 32, "cross_attention_frequency": 1}
    config = hf.GraniteSpeechConfig(
        encoder_config=ears,
        projector_config=between,
        text_config=GQA | {"model_type": "granite"},
        audio_token_index=AUDIO,
        audio_token_id=AUDIO,
        has_lora_adapter=False,
        window_size=10,
        downsample_rate=5,
    )
    features = {"input_features": torch.randn(2, 20, 16), "input_features_mask": torch.ones(2, 4, dtype=torch.bool)}
    return hf.GraniteSpeechForConditionalGeneration(config), tokens(12, audio=(AUDIO, 2, 6)) | features


def qwen2_5_omni() -> Made:
    config = hf.Qwen2_5OmniThinkerConfig(
        audio_config=EARS | {"max_source_positions": 100, "n_window": 10, "output_dim": 32},
        vision_config=EYES,
        text_config=GQA | SECTIONS,
        audio_token_index=AUDIO,
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        audio_start_token_id=HEAR,
        audio_end_token_id=HEARD,
        vision_start_token_id=START,
        vision_end_token_id=END,
    )
    places = {"start": (START, 1, 2), "image": (IMAGE, 2, 6), "end": (END, 6, 7)}
    places |= {"hear": (HEAR, 8, 9), "audio": (AUDIO, 9, 19), "heard": (HEARD, 19, 20)}
    batch = tokens(24, **places) | patches() | {"input_features": torch.randn(2, 8, 40)}
    batch["feature_attention_mask"] = torch.ones(2, 40, dtype=torch.long)
    return hf.Qwen2_5OmniThinkerForConditionalGeneration(config), batch


def speecht5() -> Made:
    config = hf.SpeechT5Config(
        **SPEECH,
        hidden_size=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        vocab_size=64,
        speech_decoder_prenet_units=16,
        speaker_embedding_dim=16,
        speech_decoder_postnet_units=16,
        num_mel_bins=8,
    )
    batch = {"input_ids": torch.randint(3, 60, (2, 12)), "decoder_input_values": torch.randn(2, 10, 8)}
    return hf.SpeechT5ForTextToSpeech(config), batch | {"speaker_embeddings": torch.randn(2, 16)}


def wav2vec2() -> Made:
    config = hf.Wav2Vec2Config(**SIZES, **SPEECH, vocab_size=32)
    return hf.Wav2Vec2ForSequenceClassification(config), {"input_values": torch.randn(2, 2000)}


FAMILIES: dict[str, Callable[[], Made]] = {
    make.__name__: make for make in (siglip, voxtral, granite_speech, qwen2_5_omni, speecht5, wav2vec2)
}
