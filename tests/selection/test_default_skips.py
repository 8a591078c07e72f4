"""The layers that the defaults leave out, and what was measured of those that they no longer do."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import transformers as hf
from transformers.quantizers import HfQuantizer

from optimum_fp8 import FP8Config, convert, prepare, quantization_report
from optimum_fp8.selection.default_skips import EXEMPTIONS, KEPT, default_skips

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.part_sensitivity import in_float32, sensitivity, tiny_clip, tiny_whisper

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
TEXT = SIZES | {"vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2, "projection_dim": 16}
WEIGHTS_ONLY = {"activation_scheme": "weight_only"}


def clip():
    vision = hf.CLIPVisionConfig(**SIZES, image_size=16, patch_size=8)
    return hf.CLIPModel(hf.CLIPConfig(text_config=TEXT, vision_config=vision, projection_dim=16))


VISION = SIZES | {"image_size": 16, "patch_size": 8, "projection_dim": 16}
LAST = [
    (clip, "text_projection"),
    (lambda: hf.CLIPTextModelWithProjection(hf.CLIPTextConfig(**TEXT)), "text_projection"),
    (lambda: hf.CLIPVisionModelWithProjection(hf.CLIPVisionConfig(**VISION)), "visual_projection"),
]


@pytest.mark.parametrize("make, last", LAST)
def test_the_last_module_of_clip_is_no_head(make, last):
    model = make()
    assert HfQuantizer.get_modules_to_not_convert(model) == [last], "by its place"
    assert default_skips(model) == []
    converted = convert(model, FP8Config(**WEIGHTS_ONLY))
    assert last in [row.name for row in quantization_report(converted).quantized]
    kept = convert(make(), FP8Config(**WEIGHTS_ONLY, blocklist={"names": [last]}))
    assert last not in [row.name for row in quantization_report(kept).quantized]


def test_it_is_found_inside_of_another_module():
    import torch

    model = prepare(torch.nn.ModuleDict({"clip": clip()}), FP8Config())
    assert default_skips(model) == []


def test_a_classifier_stays_out():
    config = hf.ViTConfig(**SIZES, image_size=16, patch_size=8)
    assert default_skips(hf.ViTForImageClassification(config)) == ["classifier"]


def whisper():
    sizes = {"d_model": 32, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 48}
    ids = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    config = hf.WhisperConfig(**sizes, **ids, num_mel_bins=8, max_source_positions=16, classifier_proj_size=16)
    return hf.WhisperForAudioClassification(config)


def test_what_reads_the_spectrogram_of_whisper_stays_out():
    report = quantization_report(convert(whisper(), FP8Config(**WEIGHTS_ONLY)))
    reasons = {row.name: row.reason for row in report.modules if not row.quantized}
    assert reasons["encoder.conv1"] == "kept by default: it reads the spectrogram"
    assert "encoder.conv2" not in reasons and "classifier" in reasons
    lifted = quantization_report(convert(whisper(), FP8Config(**WEIGHTS_ONLY, quantize_lm_head=True)))
    assert "encoder.conv1" in [row.name for row in lifted.quantized]


def test_a_checkpoint_in_which_it_is_in_fp8_is_loaded_as_it_is(tmp_path):
    convert(whisper(), FP8Config(**WEIGHTS_ONLY, quantize_lm_head=True)).save_pretrained(tmp_path)
    again = hf.WhisperForAudioClassification.from_pretrained(tmp_path)
    assert "encoder.conv1" in [row.name for row in quantization_report(again).quantized]


@pytest.mark.slow
def test_what_reads_the_spectrogram_costs_more_than_all_linear_layers():
    case = tiny_whisper()
    expected = in_float32(case)
    first, linear = (
        sensitivity(case, pattern, expected) for pattern in ("conv1$", "self_attn|fc[12]$|projector|class")
    )
    assert first.layers == 1 and linear.layers == 14
    assert first.error > 1.2 * linear.error and first.kl > 1.5 * linear.kl, KEPT


@pytest.mark.slow
def test_projections_of_a_trained_clip_cost_alike():
    case = tiny_clip()
    expected = in_float32(case)
    text, vision = (sensitivity(case, f"{name}_projection", expected) for name in ("text", "visual"))
    assert text.layers == vision.layers == 1 and text.changed <= 0.005
    assert 0 < text.error < 1.3 * vision.error < 0.03, EXEMPTIONS
