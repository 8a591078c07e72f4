"""Which keys of FP8Config contradict each other, for the whole model and for some modules."""

import pytest

from optimum_fp8 import FP8Config
from optimum_fp8.errors import FP8ConfigError

DYNAMIC_ONLY = {"granularity": "PCS", "rounding_method": "POW2"}


@pytest.mark.core
@pytest.mark.parametrize(
    "options, advice",
    [
        ({"dynamic_quantization": True, "activation_scheme": "static"}, "drop one of them"),
        ({"dynamic_quantization": True, "activation_scheme": "weight_only"}, "drop one of them"),
        ({"scale_method": "maxabs_pcs_pow2", "activation_scheme": "static"}, "use activation_scheme='dynamic'"),
        ({"scale_method": "unit_scale", "dynamic_quantization": True}, "or a maxabs method"),
        ({"scale_method": "hw_aligned_single_scale", "activation_scheme": "dynamic"}, "or a maxabs method"),
        ({"dataset": ["a"], "activation_scheme": "dynamic"}, "drop the dataset"),
        ({"dataset": ["a"], "activation_scheme": "weight_only"}, "drop the dataset"),
        ({"dataset": ["a"], "scale_method": "maxabs_pcs_pow2"}, "drop the dataset"),
        ({"measure_exclude": "INPUT", "activation_scheme": "static"}, "use measure_exclude='OUTPUT'"),
        ({"measure_exclude": "ALL", "dataset": ["a"]}, "use measure_exclude='OUTPUT'"),
        ({"mode": "MEASURE", "activation_scheme": "dynamic"}, "use mode='AUTO'"),
        ({"mode": "MEASURE", "measure_exclude": "ALL"}, "measure"),
        ({"mode": "QUANTIZE", "dataset": ["a"]}, "drop the dataset"),
        ({"mode": "LOAD", "dataset": ["a"]}, "drop the dataset"),
        ({"dequantize": True, "dataset": ["a"]}, "cannot be combined"),
        ({"dequantize": True, "mode": "MEASURE"}, "cannot be combined"),
        ({"fold_batch_norm": True, "calibration": "sequential"}, "use calibration='whole'"),
        ({"fake_quant": True, "attention": True}, "leave attention and kv_cache out"),
        ({"fake_quant": True, "overrides": {"a": {"kv_cache": True}}}, "leave attention and kv_cache out"),
        ({"fake_quant": True, "mode": "MEASURE"}, "leave mode out"),
        ({"fake_quant": True, "dataset": ["a"]}, "leave dataset and calibration out"),
        ({"fake_quant": True, "observer": "mse"}, "leave observer out"),
        ({"fake_quant": True, "fold_batch_norm": True}, "train without fold_batch_norm"),
        ({"fake_quant": True, "dequantize": True}, "leave one of them out"),
        ({"amax_history_len": 2}, "say fake_quant=True"),
        ({"freeze_scales_at": 2}, "say fake_quant=True"),
        ({"scale_params": {"input_backoff": 0.5}, "input_backoff": 0.25}, "give one of them"),
        ({"scale_params": {"alpha": 0.5}}, "input_backoff, weight_backoff"),
        ({"scale_params": [0.5]}, "must be a dict"),
    ],
    ids=str,
)
def test_contradictions_are_refused_with_a_way_out(options, advice):
    with pytest.raises(FP8ConfigError, match=advice):
        FP8Config(**options)


@pytest.mark.parametrize(
    "options",
    [
        {"scale_method": "unit_scale", "activation_scheme": "static", "measure_exclude": "ALL"},
        {"scale_method": "maxabs_pcs_pow2", "activation_scheme": "weight_only"},
        {"activation_scheme": "dynamic", "dynamic_quantization": True},
        {"use_qdq": True, "dynamic_quantization": True},
        {"mode": "MEASURE", "dataset": ["a"]},
        {"scale_params": {"input_backoff": 0.5}, "input_backoff": 0.5},
    ],
    ids=str,
)
def test_combinations_that_make_sense_are_accepted(options):
    FP8Config(**options)


@pytest.mark.parametrize(
    "options, place",
    [
        ({"overrides": {"mlp": {"scale_method": "maxabs_pcs_pow2"}}}, r"overrides\['mlp'\]: scale_method="),
        ({"overrides": {"h.[0-9]{2}": {"dynamic_quantization": True}}}, r"overrides\['h.\[0-9\]\{2\}'\]: dynamic"),
        (
            {"scale_method": {"default": "maxabs_hw", "layers": {"3": "maxabs_pcs_pow2"}}},
            r"scale_method\['layers'\]\['3'\]: scale_method='maxabs_pcs_pow2'",
        ),
        (
            {"overrides": {"mlp": {"scale_method": {"default": "maxabs_hw", "nodes": {"a": "maxabs_pcs_pow2"}}}}},
            r"overrides\['mlp'\]\['scale_method'\]\['nodes'\]\['a'\]: ",
        ),
        (
            {"scale_method": {"default": {"weight": DYNAMIC_ONLY, "activation": DYNAMIC_ONLY}}},
            "^scale_method='maxabs_pcs_pow2' only exists dynamically",
        ),
        ({"overrides": {"a": {"dynamic_quantization": True}}}, r"overrides\['a'\]: dynamic_quantization=True"),
    ],
    ids=str,
)
def test_contradictions_of_some_modules_name_the_place(options, place):
    with pytest.raises(FP8ConfigError, match=place):
        FP8Config(activation_scheme="static", **options)


def test_rules_about_the_model_look_at_all_modules():
    """Data is of use as soon as one module is static."""
    FP8Config(activation_scheme="dynamic", dataset=["a"], overrides={"mlp": {"activation_scheme": "static"}})
    FP8Config(activation_scheme="dynamic", mode="MEASURE", overrides={"mlp": {"activation_scheme": "static"}})
    FP8Config(dataset=["a"], overrides={"mlp": {"activation_scheme": "dynamic"}})
    with pytest.raises(FP8ConfigError, match="drop the dataset"):
        FP8Config(activation_scheme="dynamic", dataset=["a"], overrides={"mlp": {"activation_scheme": "weight_only"}})


def test_what_an_override_and_an_entry_say_together_is_checked_for_the_module():
    config = FP8Config(
        scale_method={"default": "maxabs_hw", "nodes": {"a.b": "maxabs_pcs_pow2"}},
        overrides={"a": {"activation_scheme": "static"}},
    )
    assert config.for_module(["a.c"]).scheme == "static"
    with pytest.raises(FP8ConfigError, match=r"module 'a.b': scale_method='maxabs_pcs_pow2' only exists dynamically"):
        config.for_module(["a.b"])
