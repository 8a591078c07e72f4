"""Modules that differ: overrides, what FP8Config says of one module, and what is left when all is decided."""

import copy

import pytest

from optimum_fp8 import FP8Config
from optimum_fp8.errors import FP8ConfigError


@pytest.mark.core
def test_later_overrides_win_over_earlier_ones_key_by_key():
    config = FP8Config(overrides={"mlp": {"use_qdq": "True", "input_backoff": 1}, r"mlp\.up": {"input_backoff": 0.5}})
    assert config.for_module(["model.mlp.up_proj"]) == FP8Config(use_qdq=True, input_backoff=0.5)
    assert config.for_module(["model.mlp.down_proj"]) == FP8Config(use_qdq=True, input_backoff=1.0)
    assert config.for_module(["model.attn", "tied.mlp"]) == FP8Config(use_qdq=True, input_backoff=1.0)
    assert config.for_module(["model.attn"]) == FP8Config()


def test_an_override_wins_over_the_dict_of_scale_methods():
    config = FP8Config(
        scale_method={"default": "maxabs_hw", "nodes": {"a.b": "maxabs_pow2"}},
        overrides={
            "a": {"scale_method": "unit_scale"},
            "c": {"scale_method": {"default": "maxabs_arbitrary", "layer_types": {"Linear": "maxabs_pow2"}}},
        },
    )
    assert config.for_module(["a.b"]).scale_method == "unit_scale"
    assert config.for_module(["c"]).scale_method == "maxabs_arbitrary"
    assert config.for_module(["c"], ["Linear"]).scale_method == "maxabs_pow2"
    assert config.for_module(["d"]).scale_method == "maxabs_hw"
    assert {method.name for method in config.methods} == {"maxabs_hw", "maxabs_pow2", "unit_scale", "maxabs_arbitrary"}


def test_what_follows_from_the_keys_follows_for_each_module():
    config = FP8Config(
        target="cpu", overrides={"a": {"scale_method": "unit_scale", "fp8_config": "E5M2"}, "b": {"kv_cache": True}}
    )
    of_a, rest = config.for_module(["a"]), config.for_module(["c"])
    assert (of_a.scheme, rest.scheme) == ("static", "auto")
    assert (of_a.number_format.full_scale, rest.number_format.full_scale) == (57344, 448)
    assert config.wants_attention and config.for_module(["b"]).wants_attention and not rest.wants_attention


def test_modules_that_differ_in_nothing_share_one_config_until_a_key_changes():
    config = FP8Config(overrides={"mlp": {"use_qdq": True}})
    before = config.for_module(["a.mlp"])
    assert config.for_module(["b.mlp"]) is before and config.for_module(["a"]) is config.for_module(["b"])
    config.target = "gaudi2"
    assert config.for_module(["a.mlp"]).target == "gaudi2"


def test_overrides_keep_their_order_in_json_whose_keys_are_sorted(tmp_path):
    config = FP8Config(overrides={"z": {"use_qdq": True}, "a": {"scale_method": {"default": {}}}})
    config.to_json_file(tmp_path / "config.json")
    again = FP8Config.from_json_file(tmp_path / "config.json")
    assert again == config and list(again.overrides) == ["z", "a"]
    assert config != FP8Config(overrides=dict(reversed(config.overrides.items())))
    assert config.replace(target="cpu").overrides == config.overrides
    assert copy.deepcopy(config) == config
    assert eval(repr(config), {"FP8Config": FP8Config}) == config


def test_overrides_that_match_no_module_are_told():
    config = FP8Config(
        overrides={"mlp": {"use_qdq": True}, "nope": {"scale_method": {"default": {}, "nodes": {"x": {}}}}}
    )
    assert config.unused_patterns([(["a.mlp"], ["Linear"])]) == [
        ("overrides", "nope"),
        ("overrides['nope']['scale_method']['nodes']", "x"),
    ]


@pytest.mark.parametrize(
    "overrides, message",
    [
        (
            {"mlp": {"scale_methd": "x"}},
            r"unknown key 'scale_methd' in overrides\['mlp'\]: did you mean 'scale_method'",
        ),
        ({"mlp": {"dataset": ["x"]}}, r"'dataset' in overrides\['mlp'\] holds for the whole model"),
        ({"mlp": {"overrides": {}}}, "holds for the whole model"),
        (
            {"mlp": {"fp8_config": "E4M4"}},
            r"overrides\['mlp'\]\['fp8_config'\]='E4M4' is not valid: did you mean 'E4M3'",
        ),
        ({"mlp": {"scale_method": "maxabs"}}, r"overrides\['mlp'\]\['scale_method'\]='maxabs' is unknown"),
        ({"(": {}}, "not a regular expression"),
        ({"mlp": "maxabs_hw"}, r"overrides\['mlp'\]='maxabs_hw' is not valid"),
        ("mlp", "expected {pattern: {key: value}}"),
    ],
    ids=str,
)
def test_bad_overrides_are_refused_with_what_is_valid(overrides, message):
    with pytest.raises(FP8ConfigError, match=message):
        FP8Config(overrides=overrides)


@pytest.mark.parametrize("auto", ["static", "dynamic"])
def test_a_decided_config_says_every_exception_by_name(auto):
    config = FP8Config(
        scale_method={"default": "maxabs_hw", "nodes": {"b.0": "maxabs_pcs_pow2"}, "layer_types": {"X": "unit_scale"}},
        overrides={"mlp": {"dynamic_quantization": True}, "head": {"activation_scheme": "weight_only"}},
        dataset=["a"],
    )
    schemes = {"a": auto, "a.mlp": "dynamic", "b.0": "dynamic", "x.1": "static", "head": "weight_only", "other": auto}
    modules = [([name], ["X" if name == "x.1" else "Linear"]) for name in schemes]
    decided = FP8Config.from_dict(config.decided(auto, modules, mode="LOAD", dataset=None).to_dict())
    assert {name: decided.for_module([name]).scheme for name in schemes} == schemes
    for names, types in modules:
        assert decided.for_module(names).method == config.for_module(names, types).method
    assert decided.mode == "LOAD" and decided.unused_patterns(modules) == []
    assert decided.for_module(["x.10"]).scheme == decided.for_module(["b-0"]).scheme == auto, (
        "names are taken literally"
    )
