"""Mixtures of experts that see images: quantized while loading, calibrated with images, saved and reloaded."""

from __future__ import annotations

import pytest
import torch
import transformers as hf
from moe_models import NAMED, TEXT
from safetensors import safe_open
from transformers import AutoModelForImageTextToText

from optimum_fp8 import FP8Config, quantization_report
from optimum_fp8.modules.fused_experts import FP8FusedExperts

IMAGE = 60


def qwen3_vl_moe():
    text = NAMED | {"head_dim": 8, "rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1]}}
    vision = {
        "depth": 1, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "patch_size": 4,
        "spatial_merge_size": 2, "temporal_patch_size": 2, "out_hidden_size": 32, "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0],
    }  # fmt: skip
    special = {"image_token_id": IMAGE, "video_token_id": 61, "vision_start_token_id": 62, "vision_end_token_id": 63}
    config = hf.Qwen3VLMoeConfig(text_config=text, vision_config=vision, **special)
    ids = torch.tensor([[5, 62, IMAGE, IMAGE, IMAGE, IMAGE, 63, 7, 9, 11, 13, 17]])
    images = {"pixel_values": torch.linspace(-1, 1, 16 * 96).view(16, 96), "image_grid_thw": torch.tensor([[1, 4, 4]])}
    return hf.Qwen3VLMoeForConditionalGeneration(config), {
        "input_ids": ids, "mm_token_type_ids": (ids == IMAGE).int(), **images}  # fmt: skip


def step3p7():
    text = TEXT | {
        "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 8,
        "mlp_layer_types": ["sparse"], "share_expert_dim": 24, "sliding_window": 8, "swiglu_limits": [0.5],
    }  # fmt: skip
    vision = {
        "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "image_size": 16, "patch_size": 2
    }  # fmt: skip
    config = hf.Step3p7Config(text_config=text, vision_config=vision, image_token_id=IMAGE)
    ids = torch.tensor([[5, IMAGE, IMAGE, IMAGE, IMAGE, 7, 9, 11, 13, 17]])
    return hf.Step3p7ForConditionalGeneration(config), {
        "input_ids": ids, "pixel_values": torch.linspace(-1, 1, 3 * 256).view(1, 3, 16, 16)}  # fmt: skip


@pytest.mark.parametrize("family", [qwen3_vl_moe, step3p7])
@torch.no_grad()
def test_calibrated_with_images_saved_and_reloaded(family, tmp_path):
    torch.manual_seed(0)
    plain, inputs = family()
    plain.eval().save_pretrained(tmp_path / "plain")
    high = plain(**inputs).logits
    config = FP8Config(dataset=[inputs], observer="maxabs")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "plain", quantization_config=config)
    rows = [row for row in quantization_report(model).quantized if row.tokens_of_experts]
    assert rows and sum(rows[0].tokens_of_experts) == 2 * inputs["input_ids"].numel(), "each token goes to two"
    expected = model(**inputs).logits
    assert (expected - high).norm() / high.norm() < 0.1
    model.save_pretrained(tmp_path / "fp8")
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "fp8")
    assert any(isinstance(module, FP8FusedExperts) for module in again.modules())
    assert torch.equal(again(**inputs).logits, expected)
    back = again.dequantize()
    assert (back(**inputs).logits - expected).norm() / expected.norm() < 0.1
    back.save_pretrained(tmp_path / "back")
    assert names(tmp_path / "back") == names(tmp_path / "plain")


def names(folder) -> set[str]:
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        return set(file.keys())
