"""What no rule can know: configurations and inputs of some architectures, each with the reason."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import transformers as hf

from .facts import Facts

_SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
_TEXT = _SIZES | {"vocab_size": 160, "max_position_embeddings": 64}
_DECODER = _TEXT | {"is_decoder": True, "add_cross_attention": True}
_PICTURE = _SIZES | {"image_size": 32, "patch_size": 8}
_SOUND = {"conv_dim": [32] * 3, "conv_stride": [5, 4, 2], "conv_kernel": [10, 4, 2], "num_conv_pos_embedding_groups": 4}


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

# Fields that have to fit together in a way that names do not tell.
FIELDS: dict[str, dict[str, Any]] = {"bamba": {"attn_layer_indices": [1]}}

# Inputs with a meaning of their own.
INPUTS: dict[str, Callable[[Any, Facts], Iterator[dict[str, Any]]]] = {}
