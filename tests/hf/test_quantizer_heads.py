"""Output heads in FP8 (`quantize_lm_head=True`) and layers of speech models: families beside the model with the
dequantized weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn

from optimum_fp8 import FP8Config, quantization_report
from optimum_fp8.modules import fp8_modules

IDS = {"input_ids": torch.tensor([[3, 5, 9, 2, 1], [7, 4, 6, 1, 4]])}
SPEECH = {"input_values": torch.randn(2, 400, generator=torch.Generator().manual_seed(1))}
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
TEXT = SIZES | {"vocab_size": 64}
PAIR = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "vocab_size": 64}
PAIR |= {"decoder_attention_heads": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 40}
FRAMES = {"conv_dim": [16, 16], "conv_stride": [5, 2], "conv_kernel": [10, 3], "num_conv_pos_embeddings": 4}
FRAMES |= {"num_conv_pos_embedding_groups": 4, "num_feat_extract_layers": 2}
SOUND = {"upsample_initial_channel": 16, "upsample_rates": [2, 2], "upsample_kernel_sizes": [4, 4]}
SOUND |= {"resblock_kernel_sizes": [3], "resblock_dilation_sizes": [[1, 3]]}
VITS = SOUND | {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "ffn_dim": 16, "flow_size": 16}
VITS |= {"spectrogram_bins": 9, "prior_encoder_num_flows": 1, "prior_encoder_num_wavenet_layers": 1}
VITS |= {"posterior_encoder_num_wavenet_layers": 1, "duration_predictor_num_flows": 1}

# family: (model class, its config, inputs, a layer that has to be in FP8)
FAMILIES: dict[str, tuple[Any, Any, dict[str, torch.Tensor], str]] = {
    "bart, tied": (
        hf.BartForConditionalGeneration, hf.BartConfig(**PAIR), IDS | {"decoder_input_ids": IDS["input_ids"]}, "lm_head"
    ),
    "bert, tied": (hf.BertForMaskedLM, hf.BertConfig(**TEXT), IDS, "cls.predictions.decoder"),
    "bert, classes": (hf.BertForSequenceClassification, hf.BertConfig(**TEXT), IDS, "classifier"),
    "llama, classes": (
        hf.LlamaForSequenceClassification, hf.LlamaConfig(**TEXT, pad_token_id=0), IDS, "score"
    ),
    "wav2vec2, CTC": (hf.Wav2Vec2ForCTC, hf.Wav2Vec2Config(**TEXT, **FRAMES), SPEECH, "lm_head"),
    "yolos, detection": (
        hf.YolosForObjectDetection,
        hf.YolosConfig(**SIZES, image_size=[32, 32], patch_size=8, num_detection_tokens=5),
        {"pixel_values": torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))},
        "bbox_predictor.layers.2",
    ),
    "vits, a vocoder and flows": (hf.VitsModel, hf.VitsConfig(**VITS), IDS, "decoder.upsampler.0"),
}  # fmt: skip


@torch.no_grad()
def output(model, inputs):
    torch.manual_seed(5)  # VITS draws noise
    return model(**inputs)[0]


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_family(tmp_path, family):
    model_class, config, inputs, layer = FAMILIES[family]
    torch.manual_seed(0)
    model_class(config).save_pretrained(tmp_path / "plain")
    keys = FP8Config(target="cpu", activation_scheme="weight_only", quantize_lm_head=True)
    model = model_class.from_pretrained(tmp_path / "plain", quantization_config=keys).eval()
    plain = model_class.from_pretrained(tmp_path / "plain").eval()
    layers = fp8_modules(model)
    assert layer in layers and all(row.quantized for row in quantization_report(model).modules)
    for name, module in layers.items():
        owner = plain.get_submodule(name)
        if hasattr(owner, "parametrizations"):
            owner.weight = module.weight.clone()
        else:
            owner.weight = nn.Parameter(module.weight.clone())  # no longer tied
    found = output(model, inputs)
    torch.testing.assert_close(found, output(plain, inputs), rtol=1e-3, atol=1e-4)
    model.save_pretrained(tmp_path / "fp8")
    again = model_class.from_pretrained(tmp_path / "fp8").eval()
    assert set(fp8_modules(again)) == set(layers) and torch.equal(output(again, inputs), found)
