"""What a configuration given to `from_pretrained` may change of an FP8 checkpoint, key by key, without loading one."""

from __future__ import annotations

import pytest
from tiny_models import tiny_llama

from optimum_fp8 import FP8Config
from optimum_fp8.errors import FP8CheckpointError
from optimum_fp8.hf.load_overrides import apply_load_overrides, check_module_overrides
from optimum_fp8.selection import select


def checkpoint(**options):
    """The configuration of a checkpoint, as it is read."""
    config = FP8Config(**{"target": "cpu", **options})
    decisions = [(each.names, each.types) for each in select(tiny_llama(), config) if each.selected]
    decided = config.decided("static", decisions, mode="LOAD", dynamic_quantization=False)
    return FP8Config.from_dict(decided.to_dict())


def asked(saved, **requested):
    """Both, as transformers brings them together."""
    for name, value in FP8Config(**requested).get_loading_attributes().items():
        setattr(saved, name, value)
    return saved


@pytest.mark.core
def test_nothing_asked_changes_nothing():
    saved = checkpoint()
    assert apply_load_overrides(asked(saved)) == "cpu" and saved == checkpoint()


@pytest.mark.core
@pytest.mark.parametrize("target", ["gaudi2", "gaudi3", "cuda", "cpu"])
def test_the_target_is_free_and_what_it_was_made_for_is_told(target):
    saved = checkpoint(target="gaudi3")
    assert apply_load_overrides(asked(saved, target=target)) == "gaudi3" and saved.target == target


def test_auto_means_what_it_was_made_for():
    saved = checkpoint(target="gaudi3")
    assert apply_load_overrides(asked(saved, target="auto")) == "gaudi3" and saved.target == "gaudi3"


@pytest.mark.parametrize("mode", ["AUTO", "LOAD"])
def test_dequantize_and_mode(mode):
    saved = checkpoint()
    apply_load_overrides(asked(saved, dequantize=True, mode=mode))
    assert saved.dequantize is True and saved.mode == "LOAD"


@pytest.mark.core
@pytest.mark.parametrize(
    "requested",
    [
        {"fp8_config": "E4M3"},
        {"scale_method": "MAXABS_HW"},
        {"activation_scheme": "static"},
        {"overrides": {}},
        {"modules_to_not_convert": None},
    ],
    ids=str,
)
def test_what_it_has_anyway_may_be_said(requested):
    saved = checkpoint()
    apply_load_overrides(asked(saved, **requested))
    check_module_overrides(tiny_llama(), saved, select(tiny_llama(), saved))


@pytest.mark.core
@pytest.mark.parametrize(
    "requested, message",
    [
        ({"fp8_config": "E5M2"}, "fp8_config='E5M2' was asked for, but the checkpoint was quantized with 'E4M3'"),
        ({"scale_method": "maxabs_pow2"}, "scale_method='maxabs_pow2' was asked for"),
        ({"activation_scheme": "dynamic"}, "activation_scheme='dynamic' was asked for"),
        ({"attention": True}, "attention=True was asked for"),
        ({"dataset": ["text"]}, "a dataset was given, but this checkpoint is quantized already"),
        ({"mode": "QUANTIZE"}, "mode='QUANTIZE': this checkpoint is FP8 already"),
        ({"mode": "MEASURE"}, "mode='MEASURE': this checkpoint is FP8 already"),
    ],
)
def test_what_would_need_the_original_weights_is_refused(requested, message):
    with pytest.raises(FP8CheckpointError, match=message):
        apply_load_overrides(asked(checkpoint(), **requested))


# --- module by module ---------------------------------------------------------------------------------------------


def load(saved, **requested):
    model = tiny_llama()
    apply_load_overrides(asked(saved, **requested))
    check_module_overrides(model, saved, select(model, saved))


MIXED = {"up_proj": {"fp8_config": "E5M2"}, "down_proj": {"dynamic_quantization": True}}


@pytest.mark.core
@pytest.mark.parametrize("options", [{}, {"activation_scheme": "static"}, {"activation_scheme": "dynamic"}], ids=str)
def test_what_was_asked_for_when_it_was_quantized_may_be_asked_for_again(options):
    overrides = {"up_proj": {"fp8_config": "E5M2"}, "down_proj": {"activation_scheme": "weight_only"}}
    saved = checkpoint(overrides=overrides, **options)
    load(saved, overrides=overrides)
    load(checkpoint(overrides=MIXED), overrides=MIXED)


def test_modules_may_be_meant_otherwise():
    load(checkpoint(overrides=MIXED), overrides={r"mlp\.up": MIXED["up_proj"], r"^model\..*down": MIXED["down_proj"]})
    load(checkpoint(overrides=MIXED), overrides={r"^layers\.0\.mlp\.up": MIXED["up_proj"], "down": MIXED["down_proj"]})


@pytest.mark.core
@pytest.mark.parametrize(
    "overrides, name",
    [
        ({"up_proj": {"fp8_config": "E5M2"}}, "down_proj"),
        ({**MIXED, "up_proj": {"fp8_config": "E4M3"}}, "up_proj"),
        ({**MIXED, "gate_proj": {"input_backoff": 1.0}}, "gate_proj"),
    ],
)
def test_anything_else_is_refused_by_the_modules_name(overrides, name):
    message = (
        rf"^model\.layers\.0\.mlp\.{name}: overrides ask for E.M. on cpu, .*, but the checkpoint has E.M. on cpu, "
    )
    with pytest.raises(FP8CheckpointError, match=message):
        load(checkpoint(overrides=MIXED), overrides=overrides)


def test_where_scales_are_written_alike_the_difference_is_refused_all_the_same():
    """A backoff is no part of the text, but of the scheme."""
    with pytest.raises(FP8CheckpointError, match=r"up_proj: overrides ask for"):
        load(checkpoint(), overrides={"up_proj": {"weight_backoff": 1.0}})


def test_the_dict_of_scale_methods():
    methods = {"default": "maxabs_hw", "nodes": {"model.layers.0.mlp.up_proj": "maxabs_pow2"}}
    load(checkpoint(scale_method=methods), scale_method=methods)
    with pytest.raises(FP8CheckpointError, match="up_proj: scale_method ask for"):
        load(checkpoint(), scale_method=methods)
