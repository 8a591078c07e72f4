"""Presets: each by its name gives the scheme that checkpoints of that name have."""

import pytest
import torch
from torch import nn

from optimum_fp8 import FP8Config, convert, prepare
from optimum_fp8.config.presets import PRESETS
from optimum_fp8.errors import FP8ConfigError

SHAPES = {"FP8": (1,), "FP8_DYNAMIC": (256, 1), "FP8_BLOCK": (2, 3), "MXFP8": (256, 12), "W8A16": (256, 1)}


@pytest.mark.parametrize("name", PRESETS)
def test_weights_and_inputs_use_the_whole_range(name):
    torch.manual_seed(0)
    plain, x = nn.Linear(384, 256), torch.randn(7, 384)
    model = nn.Sequential(plain)
    expected, config = model(x), FP8Config.preset(name)
    if config.activation_scheme == "static":
        model = prepare(model, config)
        model(x)
    layer = convert(model, config)[0]
    assert tuple(layer.weight_scale.shape) == SHAPES[name]
    largest = layer.codes.float().abs().amax()
    assert largest == 448 or (name == "MXFP8" and 224 <= largest <= 448)
    assert (layer.input_scale is not None) == (name == "FP8")
    assert ((layer(x) - expected).norm() / expected.norm()) < 0.06


def test_keys_given_win():
    config = FP8Config.preset("fp8_dynamic", weight_backoff=0.5, kv_cache=True)
    assert config.scale_method == "full_range_pcs" and config.weight_backoff == 0.5 and config.kv_cache


def test_an_unknown_preset_names_the_nearest():
    with pytest.raises(FP8ConfigError, match="did you mean 'FP8_BLOCK'"):
        FP8Config.preset("FP8_BLOK")
