"""The layers that the defaults leave out, and what was measured of those that they no longer do."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import transformers as hf
from transformers.quantizers import HfQuantizer

from optimum_fp8 import FP8Config, convert, prepare, quantization_report
from optimum_fp8.selection.default_skips import EXEMPTIONS, default_skips

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.part_sensitivity import outputs, sensitivity, tiny_clip

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


@pytest.mark.slow
def test_projections_of_a_trained_clip_cost_alike():
    case = tiny_clip()
    expected = outputs(case.load().eval(), case)
    text, vision = (sensitivity(case, f"{name}_projection", expected) for name in ("text", "visual"))
    assert text.layers == vision.layers == 1 and text.changed <= 0.005
    assert 0 < text.error < 1.3 * vision.error < 0.03, EXEMPTIONS
