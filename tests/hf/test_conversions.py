"""Names and shapes on the way from a checkpoint to a model: what is renamed, squeezed and left to the model."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.core_model_loading import Concatenate, WeightConverter, WeightRenaming

from optimum_fp8 import FP8Config, convert
from optimum_fp8.hf.conversions import CheckCodes, Loading, QuantizeWeight, ScaleRenaming, without_fp8
from optimum_fp8.modules import FP8Linear

MODULES = ["model.layers.0.self_attn", "model.layers.1.self_attn", "encoder.attention"]


@pytest.fixture
def loading():
    seen = []
    made = Loading(lambda name, weight, maxabs: seen.append((name, weight, maxabs)))
    made.seen = seen
    return made


@pytest.fixture
def model():
    return convert(nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3)), FP8Config(activation_scheme="dynamic"))


# --- names of format version 1 ------------------------------------------------------------------------------------


@pytest.mark.core
@pytest.mark.parametrize(
    "key, expected",
    [
        ("model.layers.0.self_attn.q_scale", "model.layers.0.self_attn.fp8_scales.q_scale"),
        ("model.layers.1.self_attn.k2_scale", "model.layers.1.self_attn.fp8_scales.k2_scale"),
        ("layers.0.self_attn.p_scale", "layers.0.self_attn.fp8_scales.p_scale"),
        ("self_attn.output_scale", "self_attn.fp8_scales.output_scale"),
        ("encoder.attention.v_cache_scale", "encoder.attention.fp8_scales.v_cache_scale"),
        ("model.layers.0.self_attn.input_scale", "model.layers.0.self_attn.fp8_scales.input_scale"),
    ],
)
def test_scales_of_attention_are_renamed(key, expected):
    renaming = ScaleRenaming(MODULES)
    renamed, pattern = renaming.rename_source_key(key)
    assert renamed == expected and pattern is not None
    again, pattern = renaming.rename_source_key(renamed)
    assert again == expected and pattern is None, "new names stay"


@pytest.mark.core
@pytest.mark.parametrize(
    "key",
    [
        "model.layers.0.self_attn.q_proj.weight_scale",
        "model.layers.0.self_attn.q_proj.input_scale",
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.0.self_attn.weight_scale",
        "model.layers.0.self_attn.per_dim_scale",
        "model.layers.0.self_attn.q_scale.weight",
        "model.layers.0.my_self_attn.q_scale",
        "model.layers.0.mlp.q_scale",
        "model.layers.0.mlp.input_scale",
        "q_scale",
    ],
)
def test_other_names_are_not(key):
    assert ScaleRenaming(MODULES).rename_source_key(key) == (key, None)


def test_names_of_modules_are_taken_literally():
    renaming = ScaleRenaming(["model.at+n"])
    assert renaming.rename_source_key("model.at+n.q_scale")[0] == "model.at+n.fp8_scales.q_scale"
    assert renaming.rename_source_key("model.attn.q_scale") == ("model.attn.q_scale", None)


# --- shapes -------------------------------------------------------------------------------------------------------


@pytest.mark.core
def test_stored_codes_and_weights_of_other_modules_pass(model, loading):
    check, codes = CheckCodes(loading), torch.ones(1, 3, 4).to(torch.float8_e4m3fn)
    (found,) = check.convert({"weight": [codes]}, model=model, full_layer_name="0.weight").values()
    assert found.shape == (1, 3, 4) and found.data_ptr() == codes.data_ptr()
    (found,) = check.convert({"weight": [torch.ones(1, 3)]}, model=model, full_layer_name="1.weight").values()
    assert found.shape == (1, 3) and not loading.failures
    missing = {"a"}
    check.convert({"weight": [codes]}, model=model, full_layer_name="0.weight", missing_keys=missing)
    assert loading.missing_keys is missing


@pytest.mark.parametrize(
    "weight", [torch.ones(3, 4).to(torch.float8_e4m3fn), torch.ones(1, 3, 4), torch.ones(1, 3, 4).to(torch.float8_e5m2)]
)
def test_a_weight_that_was_not_written_so_is_remembered_as_a_failure(model, loading, weight):
    (found,) = CheckCodes(loading).convert({"weight": [weight]}, model=model, full_layer_name="0.weight").values()
    assert found.shape == (1, 3, 4), "loading goes on, and the failure is raised after it"
    assert f"found {(weight.dtype, tuple(weight.shape))}, expected" in loading.failures["0"]


def test_weights_are_quantized_as_their_module_says(model, loading):
    weight = torch.randn(3, 4)
    found = QuantizeWeight(loading).convert({"0.weight": [weight], "1.weight": torch.ones(3)}, model=model)
    expected = convert(nn.Sequential(nn.Linear(4, 3)), FP8Config(activation_scheme="dynamic"))[0]
    assert isinstance(expected, FP8Linear) and set(found) == {"0.weight", "0.weight_scale", "1.weight"}
    assert torch.allclose(found["0.weight"].float() * found["0.weight_scale"], weight, rtol=2**-4, atol=1e-2)
    ((name, seen, maxabs),) = loading.seen
    assert name == "0" and seen is weight and maxabs == weight.abs().max()


@pytest.mark.parametrize(
    "weight, message",
    [
        (torch.full((3, 4), torch.nan), "holds NaN or Inf"),
        (torch.ones(4, 3), r"is \(4, 3\), the model expects \(3, 4\)"),
    ],
)
def test_a_weight_that_cannot_be_quantized_is_remembered_as_a_failure(model, loading, weight, message):
    QuantizeWeight(loading).convert({"0.weight": [weight]}, model=model)
    with pytest.raises(ValueError, match=message):
        raise ValueError(loading.failures["0"])
    assert not loading.seen


# --- a model's own ------------------------------------------------------------------------------------------------


def test_conversions_that_touch_fp8_weights_are_left_out():
    fused = WeightConverter(["q_proj.weight", "k_proj.weight"], "qk_proj.weight", [Concatenate(dim=0)])
    other = WeightConverter(["a.weight", "b.weight"], "ab.weight", [Concatenate(dim=0)])
    renaming, ours = WeightRenaming("old", "new"), ScaleRenaming(MODULES)
    everything = [fused, other, renaming, ours]
    assert without_fp8(everything, ["layers.0.qk_proj.weight"]) == [other, renaming]
    assert without_fp8(everything, ["layers.0.q_proj.weight"]) == [other, renaming]
    assert without_fp8(everything, []) == [fused, other, renaming]
