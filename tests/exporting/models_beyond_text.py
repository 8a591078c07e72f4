"""Small models that see or hear, or whose head is tied, with a batch for each; sizes are those of blocks and groups."""

from __future__ import annotations

import torch
import transformers as hf

SIZES = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT = SIZES | {"vocab_size": 96, "max_position_embeddings": 32, "eos_token_id": 2, "bos_token_id": 1}
EYES = SIZES | {"image_size": 32, "patch_size": 8}
IMAGE = 5  # a token


def vit():
    config = hf.ViTConfig(**EYES, num_labels=64)
    return hf.ViTForImageClassification(config), {"pixel_values": torch.randn(2, 3, 32, 32)}


def clip():
    config = hf.CLIPConfig(text_config=TEXT, vision_config=EYES, projection_dim=64)
    return hf.CLIPModel(config), {"input_ids": torch.randint(3, 96, (2, 8)), "pixel_values": torch.randn(2, 3, 32, 32)}


def llava():
    config = hf.LlavaConfig(
        vision_config=hf.CLIPVisionConfig(**EYES, projection_dim=64),
        text_config=hf.LlamaConfig(**TEXT, num_key_value_heads=2),
        image_token_index=IMAGE,
        image_seq_length=16,
    )
    ids = torch.randint(8, 96, (2, 24))
    ids[:, 2:18] = IMAGE
    return hf.LlavaForConditionalGeneration(config), {"input_ids": ids, "pixel_values": torch.randn(2, 3, 32, 32)}


def whisper():
    sides = {f"{side}_{key}": value for side in ("encoder", "decoder") for key, value in PARTS.items()}
    config = hf.WhisperConfig(
        **(sides | {"d_model": 128, "vocab_size": 96, "num_mel_bins": 8, "decoder_start_token_id": 1}),
        **({"max_source_positions": 20, "max_target_positions": 20, "pad_token_id": 0, "eos_token_id": 2}),
        suppress_tokens=[],
        begin_suppress_tokens=[],
    )
    batch = {"input_features": torch.randn(2, 8, 40), "decoder_input_ids": torch.randint(3, 96, (2, 6))}
    return hf.WhisperForConditionalGeneration(config), batch


PARTS = {"layers": 1, "attention_heads": 2, "ffn_dim": 256}


def tied_llama():
    config = hf.LlamaConfig(**TEXT, num_key_value_heads=2, tie_word_embeddings=True)
    return hf.LlamaForCausalLM(config), {"input_ids": torch.randint(3, 96, (2, 8))}


def outputs_of(model, batch):
    """Logits, or how images and texts go together."""
    with torch.no_grad():
        found = model.eval()(**batch)
    return (found.logits if "logits" in found else found.logits_per_image).float()
