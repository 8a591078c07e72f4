"""From configuration to schemes: every key arrives in its scheme, and what names a module closest wins."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from scale_methods import FOR_ANY_SHAPE
from tiny_models import tiny_llama

from optimum_fp8 import FP8Config
from optimum_fp8.config.keys import KEYS
from optimum_fp8.formats import number_format
from optimum_fp8.scales import SCALE_METHODS, PerHead, PerTensor, PerToken, Scheme
from optimum_fp8.selection import scheme_for, select

NAMES, TYPES = ["model.layers.3.mlp.up_proj"], ["Linear", "torch.nn.Linear"]
HW, POW2 = SCALE_METHODS["maxabs_hw"], SCALE_METHODS["maxabs_pow2"]
ACT = HW.activation
BASE = Scheme(number_format("E4M3", "cpu"), HW.weight, ACT, ACT, ACT, activations="static")
FULL, TOKEN = ACT.with_backoff(1.0), replace(ACT.with_backoff(0.5), granularity=PerToken())

# key: (value, the fields of a scheme that it changes)
EFFECTS = {
    "fp8_config": ("E5M2", {"fmt": number_format("E5M2", "cpu")}),
    "hp_dtype": ("fp32", {"hp_dtype": torch.float32}),
    "scale_method": (
        "maxabs_pow2",
        {"weight": POW2.weight, **dict.fromkeys(("input", "operands", "probabilities"), POW2.activation)},
    ),
    "input_backoff": (1.0, dict.fromkeys(("input", "operands", "probabilities"), FULL)),
    "weight_backoff": (1.0, {"weight": HW.weight.with_backoff(1.0)}),
    "scale_format": ("const", {"constant_scales": False}),
    "row_parallel_linear_allreduce_quantization": (True, {"fp8_all_reduce": True}),
    "dynamic_quantization": (True, {"activations": "dynamic", "input": TOKEN, "operands": TOKEN}),
    "use_qdq": (True, {"arithmetic": "qdq", "dataflow": "qdq"}),
    "activation_scheme": ("dynamic", {"activations": "dynamic", "input": TOKEN, "operands": TOKEN}),
    "quantize_embeddings": (True, {"embeddings": True}),
    "attention": (True, {"rounds_attention": True}),
    "kv_cache": (True, {"caches": True}),
    "kv_cache_skip": ("sliding", {"caches_windows": False}),
    "attention_granularity": ("head", {"operands": replace(ACT, granularity=PerHead())}),
    "attention_dataflow": ("unfused", {"dataflow": "unfused"}),
    "softmax_backoff": (1.0, {"probabilities": FULL}),
}


def test_there_is_a_case_for_every_key_of_a_module():
    assert set(EFFECTS) == {name for name, key in KEYS.items() if key.of_module}


@pytest.mark.core
@pytest.mark.parametrize("key", EFFECTS)
def test_each_key_changes_its_part_of_the_scheme_and_no_other(key):
    value, changes = EFFECTS[key]
    assert scheme_for(FP8Config(target="cpu"), NAMES, TYPES) == BASE
    assert scheme_for(FP8Config(target="cpu", **{key: value}), NAMES, TYPES) == replace(BASE, **changes)
    config = FP8Config(target="cpu", overrides={r"layers\.3\.": {key: value}})
    assert scheme_for(config, NAMES, TYPES) == replace(BASE, **changes), "by an override"
    assert scheme_for(config, ["model.layers.30.mlp.up_proj"], TYPES) == scheme_for(config) == BASE


@pytest.mark.parametrize("target", ["gaudi2", "gaudi3", "cuda", "cpu"])
def test_the_target_decides_format_and_arithmetic(target):
    scheme = scheme_for(FP8Config(target=target))
    assert scheme.fmt == number_format("E4M3", target)
    assert scheme.arithmetic == ("gaudi" if target.startswith("gaudi") else "fused") and scheme.dataflow == "fused"


@pytest.mark.core
@pytest.mark.parametrize(
    "options, calibrated, activations",
    [
        ({}, True, "static"),
        ({}, False, "dynamic"),
        ({"activation_scheme": "static"}, False, "static"),
        ({"activation_scheme": "weight_only"}, False, "weight_only"),
        ({"scale_method": "maxabs_pcs_pow2"}, True, "dynamic"),
        ({"scale_method": "unit_scale"}, False, "static"),
    ],
)
def test_auto_is_static_where_there_are_ranges_or_none_are_needed(options, calibrated, activations):
    scheme = scheme_for(FP8Config(target="cpu", **options), calibrated=calibrated)
    assert scheme.activations == activations


def test_dynamic_scales_need_less_headroom_unless_it_is_said():
    assert scheme_for(FP8Config(), calibrated=False).input.backoff == 0.5
    assert scheme_for(FP8Config(input_backoff=0.3), calibrated=False).input.backoff == 0.3


PER_TENSOR = (
    "maxabs_pow2",
    "maxabs_arbitrary",
    "maxabs_pow2_opt_weight",
    "act_maxabs_pow2_weights_pcs_maxabs_pow2",
    "act_maxabs_pow2_weights_pcs_opt_pow2",
    "full_range_by_tensor",
    "full_range_pcs_by_tensor",
)


@pytest.mark.parametrize("name", [name for name, method in FOR_ANY_SHAPE.items() if method.activation.needs_range])
def test_dynamic_scales_are_per_token_where_inc_has_none_per_tensor(name):
    dynamic = scheme_for(FP8Config(scale_method=name, activation_scheme="dynamic")).input.granularity
    assert dynamic == (PerTensor() if name in PER_TENSOR else PerToken())
    if not SCALE_METHODS[name].dynamic_only:
        assert scheme_for(FP8Config(scale_method=name, activation_scheme="static")).input.granularity == PerTensor()


def test_layers_may_be_weight_only_beside_attention_in_fp8():
    overrides = {"up_proj": {"activation_scheme": "weight_only"}}
    config = FP8Config(target="cpu", attention=True, overrides=overrides)
    assert scheme_for(config).rounds_attention
    assert (scheme_for(config, NAMES).activations, scheme_for(config, NAMES).rounds_attention) == ("weight_only", False)


def test_qdq_wins_over_the_dataflow_of_attention():
    assert scheme_for(FP8Config(use_qdq=True, attention_dataflow="unfused")).dataflow == "qdq"


# --- in a model ---------------------------------------------------------------------------------------------------

BY_DICT = {
    "default": "maxabs_hw",
    "nodes": {"model.layers.0.mlp.up_proj": "unit_scale"},
    "layers": {"1": "maxabs_pow2"},
    "layer_types": {"Linear": "maxabs_arbitrary"},
}


def methods(config, layers=2):
    """What a Llama's modules are scaled by: the name of the method whose weight rule a scheme has."""
    names = {each.weight: name for name, each in reversed(FOR_ANY_SHAPE.items())}
    model = tiny_llama()
    model.model.layers.extend([tiny_llama().model.layers[0] for _ in range(layers - 1)])
    return {each.name.removeprefix("model.layers."): names[each.scheme.weight] for each in select(model, config)}


def test_nodes_win_over_layers_and_layers_over_types():
    found = methods(FP8Config(scale_method=BY_DICT))
    assert found["0.mlp.up_proj"] == "unit_scale"
    assert found["0.mlp.down_proj"] == found["lm_head"] == "maxabs_arbitrary"
    assert {name: found[name] for name in found if name.startswith("1.")} == dict.fromkeys(
        [name for name in found if name.startswith("1.")], "maxabs_pow2"
    )


def test_overrides_win_over_nodes_and_the_last_override_wins():
    overrides = {"mlp": {"scale_method": "maxabs_hw"}, r"1\.mlp": {"scale_method": "hw_aligned_single_scale"}}
    found = methods(FP8Config(scale_method=BY_DICT, overrides=overrides))
    assert found["0.mlp.up_proj"] == "maxabs_hw" and found["1.mlp.up_proj"] == "hw_aligned_single_scale"
    assert found["1.self_attn.q_proj"] == "maxabs_pow2" and found["0.self_attn.q_proj"] == "maxabs_arbitrary"


def test_a_type_may_be_called_by_each_of_its_names():
    for name in ("Linear", "torch.nn.Linear"):
        config = FP8Config(scale_method={"default": "maxabs_hw", "layer_types": {name: "maxabs_pow2"}})
        assert set(methods(config).values()) == {"maxabs_pow2"}, name
