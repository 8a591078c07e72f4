"""Blocks of many families are calibrated one after the other: each on what the quantized ones before it give."""

from __future__ import annotations

import pytest
import torch
import transformers as hf
from attention_models import ENCODER, FAMILIES, GQA, IDS, MASK, PIXELS, TEXT, TOKENS, Family

from optimum_fp8 import FP8Config
from optimum_fp8.calibration import parts_of
from optimum_fp8.errors import FP8CalibrationError
from optimum_fp8.modules import fp8_modules

VISION = {"depth": 3, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "patch_size": 4}
IMAGE_ID, BESIDE_IMAGE = 60, torch.full((2, 16), 60)
MORE = {
    "mamba": Family(
        hf.MambaForCausalLM,
        hf.MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=64, state_size=4),
        {"input_ids": IDS},
        0,
        0,
    ),
    "llava": Family(  # takes the output of the last vision block but one
        hf.LlavaForConditionalGeneration,
        hf.LlavaConfig(
            text_config=hf.LlamaConfig(**GQA),
            vision_config=hf.CLIPVisionConfig(**ENCODER, projection_dim=32),
            image_token_index=IMAGE_ID,
        ),
        {
            "input_ids": torch.cat([BESIDE_IMAGE, IDS], 1),
            "attention_mask": torch.cat([torch.ones_like(BESIDE_IMAGE), MASK], 1),
            **PIXELS,
        },
        0,
        0,
    ),
    "qwen3_vl": Family(  # text blocks read what vision blocks in the middle give
        hf.Qwen3VLForConditionalGeneration,
        hf.Qwen3VLConfig(
            text_config=GQA | {"head_dim": 8, "rope_scaling": {"rope_type": "default", "mrope_section": [2, 1, 1]}},
            vision_config=VISION
            | {"spatial_merge_size": 2, "temporal_patch_size": 1, "out_hidden_size": 32}
            | {"num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]},
            image_token_id=IMAGE_ID,
            video_token_id=61,
            vision_start_token_id=62,
            vision_end_token_id=63,
        ),
        {
            "input_ids": torch.tensor([[1, 2, 62, 60, 60, 60, 60, 63, 5, 6]]),
            "mm_token_type_ids": torch.tensor([[0, 0, 0, 1, 1, 1, 1, 0, 0, 0]]),
            "pixel_values": torch.linspace(-1, 1, 16 * 48).view(16, 48),
            "image_grid_thw": torch.tensor([[1, 4, 4]]),
        },
        0,
        0,
    ),
    "albert": Family(hf.AlbertForMaskedLM, hf.AlbertConfig(**TEXT, embedding_size=32), TOKENS, 0, 0),
    "gemma3n": Family(
        hf.Gemma3nForCausalLM,
        hf.Gemma3nTextConfig(
            **GQA | {"num_hidden_layers": 4},
            head_dim=8,
            vocab_size_per_layer_input=64,
            hidden_size_per_layer_input=8,
            laurel_rank=4,
            num_kv_shared_layers=2,
            layer_types=["sliding_attention", "full_attention"] * 2,
            activation_sparsity_pattern=[0.0] * 4,
            altup_num_inputs=2,
        ),
        TOKENS,
        0,
        0,
    ),
}


def quantized(family, folder, inputs=None):
    model = family.make()
    model.save_pretrained(folder / "model")
    config = FP8Config(
        dataset=[inputs or family.inputs] * 2,
        calibration="sequential",
        scale_method="maxabs_arbitrary",
        input_backoff=1.0,
        dump_stats_path=str(folder / "work"),
    )
    return type(model).from_pretrained(folder / "model", dtype=torch.bfloat16, quantization_config=config)


@pytest.mark.parametrize(
    "name",
    [
        *("gemma3, hybrid", "t5", "llava"),
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("whisper", "bert", "vit", "mamba", "qwen3_vl")),
    ],
)
def test_first_of_each_part_gets_what_it_was_calibrated_on(name, tmp_path):
    family = {**FAMILIES, **MORE}[name]
    model = quantized(family, tmp_path)
    modules, seen = fp8_modules(model), {}

    def note(module, args, kwargs):
        x = next(iter((*args, *kwargs.values())))
        mask = family.inputs.get("attention_mask")
        x = x[mask.bool()] if mask is not None and x.shape[:2] == mask.shape else x
        seen.setdefault(module.name, float(x.abs().max()))

    for module in modules.values():
        module.register_forward_pre_hook(note, with_kwargs=True)
    with torch.no_grad():
        model(**{key: x.to(torch.bfloat16) if x.is_floating_point() else x for key, x in family.inputs.items()})
    assert seen.keys() == modules.keys()
    parts = list(parts_of(model, list(modules)))
    first = {part: next((name for name in seen if f"{name}.".startswith(f"{part}.")), None) for part in parts}
    assert len([each for each in first.values() if each]) >= 2
    for part, name in first.items():
        if name is not None:
            measured = float(modules[name].input_scale) * 448
            assert measured == pytest.approx(seen[name], rel=0.004), f"{part}: {name}"


@pytest.mark.parametrize("name, why", [("albert", "several times"), ("gemma3n", "cannot be run so")])
def test_refused_before_the_long_work(name, why, tmp_path):
    with pytest.raises(FP8CalibrationError, match=f"{why}.*calibration='whole'"):
        quantized(MORE[name], tmp_path)


def test_decoder_without_inputs_is_refused(tmp_path):
    with pytest.raises(FP8CalibrationError, match="decoder_input_ids or labels"):
        quantized(FAMILIES["t5"], tmp_path, TOKENS)
