"""Conversion is all or nothing: whatever fails, and wherever, the model is what it was before."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from tiny_models import tiny_gpt2, tiny_llama
from torch import nn
from transformers.cache_utils import DynamicCache, DynamicLayer

from optimum_fp8 import FP8Config, convert, dequantize, finalize_calibration, prepare, quantization_report
from optimum_fp8.attention import plan_of, scales_of
from optimum_fp8.errors import FP8MeasurementError
from optimum_fp8.lifecycle import Phase, state_of
from optimum_fp8.modules import fp8_modules
from optimum_fp8.modules.handler import handlers
from optimum_fp8.scales import quantize_weight

IDS = torch.arange(3, 12)[None]
FULL = {"attention": True, "kv_cache": True, "activation_scheme": "static", "target": "cpu"}


@torch.no_grad()
def logits(model):
    return model(IDS, use_cache=False).logits


def prepared(model=None, **options):
    model = prepare(model or tiny_llama(), FP8Config(**{**FULL, **options}))
    model(IDS)
    return model


def snapshot(model):
    """What a model is made of: modules, parameters, buffers, hooks, what was set on instances, implementation."""
    return {
        "modules": [(name, id(module)) for name, module in model.named_modules()],
        "tensors": [(name, id(tensor)) for name, tensor in [*model.named_parameters(), *model.named_buffers()]],
        "hooks": [
            (len(module._forward_hooks), len(module._forward_pre_hooks), "forward" in vars(module))
            for module in model.modules()
        ],
        "implementation": model.config._attn_implementation,
        "plans": [plan_of(module) for module in model.modules()],
        "phase": state_of(model) and state_of(model).phase,
        "quantized": (getattr(model, "hf_quantizer", None), getattr(model.config, "quantization_config", None)),
    }


# --- errors -------------------------------------------------------------------------------------------------------

KINDS = [handler.kind for handler in handlers() if handler.kind in ("linear", "attention interface")]


@pytest.mark.core
@pytest.mark.parametrize("number", [0, -1])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("measured", [True, False], ids=["measured", "unprepared"])
def test_an_error_while_a_handler_applies_leaves_the_model_as_it_was(monkeypatch, kind, number, measured):
    """The first or the last module of a kind fails, before or after it changed anything."""
    options = {} if measured else {"activation_scheme": "dynamic"}
    model = prepared() if measured else tiny_llama()
    expected, before = logits(model), snapshot(model)
    handler = next(each for each in handlers() if each.kind == kind)
    names = [name for name in handler.find(model) if name != "lm_head"]
    failing, original = names[number], handler.convert

    def convert_(target, *args):
        made = original(target, *args)
        apply = made.apply

        def fails():
            apply()
            raise ZeroDivisionError(target.name)

        if target.name == failing:
            made.apply = fails
        return made

    monkeypatch.setattr(handler, "convert", convert_)
    with pytest.raises(ZeroDivisionError, match=failing):
        convert(model, *([] if measured else [FP8Config(**{**FULL, **options})]))
    assert snapshot(model) == before and torch.equal(logits(model), expected)
    monkeypatch.undo()
    convert(model, *([] if measured else [FP8Config(**{**FULL, **options})]))
    assert quantization_report(model).attention[0].quantized and len(fp8_modules(model)) == 7


@pytest.mark.core
@pytest.mark.parametrize("place", ["optimum_fp8.quantize.attach_quantizer", "optimum_fp8.attention.handlers.use_ours"])
def test_an_error_after_all_was_applied_leaves_the_model_as_it_was(monkeypatch, place):
    model = prepared()
    expected, before = logits(model), snapshot(model)

    def fails(*args):
        raise ZeroDivisionError

    monkeypatch.setattr(place, fails)
    with pytest.raises(ZeroDivisionError):
        convert(model)
    assert snapshot(model) == before and torch.equal(logits(model), expected)
    monkeypatch.undo()
    convert(model)


def test_an_interruption_counts_as_an_error(monkeypatch):
    model = prepared()
    before = snapshot(model)

    def interrupted(model):
        raise KeyboardInterrupt

    monkeypatch.setattr("optimum_fp8.quantize.attach_quantizer", interrupted)
    with pytest.raises(KeyboardInterrupt):
        convert(model)
    assert snapshot(model) == before


@pytest.mark.core
@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_dequantized_nothing_is_left_of_what_was_changed_around_the_modules(make):
    plain = make()
    implementation, expected = plain.config._attn_implementation, logits(plain)
    model = convert(prepared(plain))
    assert model.config._attn_implementation != implementation
    dequantize(model)
    assert model.config._attn_implementation == implementation and state_of(model) is None
    assert not any(plan_of(module) or scales_of(module) for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert ((logits(model) - expected).norm() / expected.norm()).item() < 0.05


# --- weights ------------------------------------------------------------------------------------------------------


@pytest.mark.core
def test_tied_weights_are_quantized_once_unless_their_schemes_differ(monkeypatch):
    calls = []

    def counted(*args):
        calls.append(args)
        return quantize_weight(*args)

    monkeypatch.setattr("optimum_fp8.modules.quantized_once.quantize_weight", counted)

    def tied(**options):
        model = nn.Sequential(*[nn.Linear(4, 4, bias=False) for _ in range(4)])
        model[1].weight = model[3].weight = model[0].weight
        calls.clear()
        return convert(model, FP8Config(activation_scheme="weight_only", target="cpu", **options))

    model = tied()
    assert len(calls) == 2 and model[0].codes is model[1].codes is model[3].codes
    assert model[0].weight_scale is model[3].weight_scale and model[2].codes is not model[0].codes
    model = tied(overrides={"^3$": {"fp8_config": "E5M2"}})
    assert len(calls) == 3 and model[0].codes is model[1].codes
    assert (model[0].codes.dtype, model[3].codes.dtype) == (torch.float8_e4m3fn, torch.float8_e5m2)
    model = tied(overrides={"^3$": {"input_backoff": 0.5}})
    assert len(calls) == 2, "what is not about the weight does not part them"


def test_a_module_in_two_places_is_meant_by_each_of_its_names_also_without_data():
    layer = nn.Linear(4, 4)
    model = nn.ModuleDict({"a": layer, "b": layer, "c": nn.Linear(4, 4)})
    convert(model, FP8Config(target="cpu", overrides={"^b$": {"fp8_config": "E5M2"}}))
    assert model["a"] is model["b"] and model["a"].activations == "dynamic"
    assert (model["a"].codes.dtype, model["c"].codes.dtype) == (torch.float8_e5m2, torch.float8_e4m3fn)
    assert state_of(model).config.for_module(["a"]).fp8_config == "E5M2"


# --- ranges -------------------------------------------------------------------------------------------------------


class TwoFamilies(nn.Module):
    """A language model and a layer beside it, either of which may stay unreached."""

    def __init__(self):
        super().__init__()
        self.llama, self.beside = tiny_llama(), nn.Linear(4, 4)

    def forward(self, ids=None, x=None):
        return (None if ids is None else self.llama(ids, use_cache=True)), (None if x is None else self.beside(x))


@pytest.mark.core
@pytest.mark.parametrize(
    "run, message",
    [
        ({"ids": IDS}, "1 selected modules were never reached by calibration: beside: calibrate with data"),
        (
            {"x": torch.ones(1, 4)},
            r"1 attention modules were never reached by calibration: llama\.model\.layers\.0\.self_attn",
        ),
    ],
    ids=["layer", "model"],
)
def test_what_was_not_reached_is_named_by_family(run, message):
    model = prepare(TwoFamilies(), FP8Config(**FULL))
    model(**run)
    before = state_of(model)
    with pytest.raises(FP8MeasurementError, match=message):
        convert(model)
    assert state_of(model) is before and before.phase is Phase.MEASURING and not fp8_modules(model)


def test_attention_that_was_not_reached_is_named_as_such():
    model = prepare(TwoFamilies(), FP8Config(**FULL, allowlist={"names": ["beside"]}))
    model(x=torch.ones(1, 4))
    with pytest.raises(
        FP8MeasurementError,
        match=r"1 attention modules were never reached by calibration: llama\.model\.layers\.0\.self_attn",
    ):
        convert(model)


def test_ranges_of_caches_that_nothing_was_written_to():
    model = prepare(tiny_llama(), FP8Config(**FULL))
    model(IDS, use_cache=False)
    with pytest.raises(FP8MeasurementError, match="kv_cache=True, but calibration wrote nothing to a cache"):
        convert(model)
    model(IDS, use_cache=True)
    convert(model)


class OwnLayer(DynamicLayer):
    """A layer of a cache that may compute with what it holds."""

    def update(self, key_states, value_states, *args, **kwargs):
        return super().update(key_states, value_states, *args, **kwargs)


@torch.no_grad()
def test_a_cache_that_stays_as_it_is_does_not_keep_a_model_from_being_converted():
    model = tiny_llama()
    plain = copy.deepcopy(model)

    def cache():
        layers = [OwnLayer() for _ in range(model.config.num_hidden_layers)]
        made = DynamicCache()
        made.layers = layers
        return made

    prepare(model, FP8Config(**FULL))
    model(IDS, past_key_values=cache())
    convert(model)
    used = cache()
    found, expected = model(IDS, past_key_values=used).logits, plain(IDS).logits
    assert all(type(layer) is OwnLayer and layer.keys.is_floating_point() for layer in used.layers)
    assert torch.cosine_similarity(found.flatten(), expected.flatten(), dim=0) > 0.98
    (row, *_) = quantization_report(model).attention
    assert "OwnLayer does more than hold keys and values" in str(row.cache_refused)


def test_unreached_modules_are_left_out_of_both_families_if_asked(caplog):
    model = prepare(TwoFamilies(), FP8Config(**FULL, ignore_modules_wo_measures=True))
    with caplog.at_level(logging.WARNING):
        model(x=torch.ones(1, 4))
        convert(model)
    assert list(fp8_modules(model)) == ["beside"]
    report = quantization_report(model)
    assert {row.reason for row in report.modules if not row.quantized} >= {"never reached by calibration"}
    assert [(row.quantized, row.reason) for row in report.attention] == [(False, "never reached by calibration")]
    assert "self_attn" in caplog.text and "up_proj" in caplog.text


def test_mixed_with_modules_that_need_no_ranges_only_those_that_do_must_be_reached():
    config = FP8Config(
        target="cpu", activation_scheme="static", overrides={"beside": {"activation_scheme": "weight_only"}}
    )
    model = prepare(TwoFamilies(), config)
    model(ids=IDS)
    finalize_calibration(model)
    convert(model)
    assert model.beside.activations == "weight_only"


def test_auto_without_data_keeps_what_overrides_say():
    overrides = {"^0$": {"activation_scheme": "weight_only"}, "^1$": {"scale_method": "unit_scale"}}
    model = nn.Sequential(*[nn.Linear(4, 4) for _ in range(3)])
    convert(model, FP8Config(target="cpu", overrides=overrides))
    assert [module.activations for module in model] == ["weight_only", "static", "dynamic"]
    decided = state_of(model).config
    assert [decided.for_module([str(i)]).scheme for i in range(3)] == ["weight_only", "static", "dynamic"]


def test_a_model_is_converted_again_after_a_copy_was():
    model = prepared()
    clone = copy.deepcopy(model)
    assert torch.equal(logits(convert(clone)), logits(convert(model)))
