"""What the configurations of known formats say."""

from __future__ import annotations

import pytest

from optimum_fp8.verifying.formats import block_size, fits, is_left_out, rules_of, without_unit_axes

STATIC = {"weights": {"strategy": "tensor"}, "input_activations": {"dynamic": False}}
BLOCKS = {"weights": {"block_structure": [128, 128]}, "input_activations": {"dynamic": True}}


@pytest.mark.parametrize(
    "said, scale, static, block, caches",
    [
        ({"quant_method": "compressed-tensors", "config_groups": {"a": STATIC}}, "weight_scale", True, None, False),
        (
            {"quant_method": "compressed-tensors", "config_groups": {"a": BLOCKS}, "kv_cache_scheme": {"num_bits": 8}},
            *("weight_scale", False, (128, 128), True),
        ),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "weight_scale_inv", False, (128, 128), False),
        ({"quant_method": "fp8", "activation_scheme": "static"}, "weight_scale_inv", True, None, False),
        (
            {"quant_method": "modelopt", "quant_algo": "FP8", "kv_cache_quant_algo": "FP8"},
            "weight_scale",
            True,
            None,
            True,
        ),
        ({"quant_method": "modelopt", "quant_algo": "FP8_PB_WO"}, "weight_scale", False, (128, 128), False),
        ({"quant_method": "fbgemm_fp8"}, "weight_scale", False, None, False),
        ({}, "weight_scale", False, None, False),
    ],
)
def test_rules(said, scale, static, block, caches):
    rules = rules_of(said)
    assert (rules.weight_scales[0], rules.static, rules.block, rules.caches) == (scale, static, block, caches)


@pytest.mark.parametrize("key", ["ignore", "modules_to_not_convert", "ignored_layers", "exclude_modules"])
def test_what_is_left_out(key):
    rules = rules_of({"quant_method": "modelopt", key: ["lm_head", "re:.*gate$", "model.vision*"]})
    for module in ("lm_head", "model.lm_head", "a.mlp.gate", "model.vision_tower.b"):
        assert is_left_out(module, rules.left_out)
    for module in ("lm_head2", "a.mlp.gate_proj", "vision"):
        assert not is_left_out(module, rules.left_out)


@pytest.mark.parametrize(
    "codes, scale, block, fit",
    [
        ((64, 32), (1,), None, True),
        ((64, 32), (), None, True),
        ((64, 32), (64, 1), None, True),
        ((64, 32), (64,), None, True),
        ((64, 32), (32, 1), None, False),
        ((64, 64), (64, 2), None, True),  # groups of 32
        ((64, 32), (63, 1), None, False),
        ((64, 32), (64, 1, 1), None, False),
        ((64, 32), (0, 1), None, False),
        ((300, 200), (3, 2), None, True),  # the last blocks are smaller
        ((300, 200), (3, 2), (128, 128), True),
        ((300, 200), (2, 2), (128, 128), False),
        ((300, 200), (1,), (128, 128), False),
        ((4, 96, 32), (4, 2, 1), None, True),
        ((4, 96, 32), (4, 1, 1), None, True),
        ((4, 96, 32), (3, 1, 1), None, False),
    ],
)
def test_whether_a_scale_fits(codes, scale, block, fit):
    assert fits(codes, scale, block) is fit


@pytest.mark.parametrize(
    "scale, found", [((2, 1, 6, 1), (2, 6)), ((2, 6), (2, 6)), ((2, 2, 6, 1), (2, 2, 6, 1)), ((2, 1, 6), (2, 1, 6))]
)
def test_scales_by_blocks_with_axes_of_one(scale, found):
    assert without_unit_axes(scale) == found


@pytest.mark.parametrize(
    "size, count, found", [(384, 3, 128), (192, 2, 128), (300, 3, 128), (64, 2, 32), (384, 2, None), (6, 3, None)]
)
def test_sizes_of_blocks(size, count, found):
    assert block_size(size, count) == found
