"""Kinds of modules from outside the package go through every step, and the registry of kinds."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from optimum_fp8 import FP8Config, convert, dequantize, finalize_calibration, ops, prepare, quantization_report
from optimum_fp8.checkpoint import checkpoint_of
from optimum_fp8.errors import FP8MeasurementError, FP8NotAvailableError
from optimum_fp8.lifecycle import state_of
from optimum_fp8.modules import (
    FP8Conv,
    FP8Linear,
    FP8Module,
    LayerHandler,
    ModuleHandler,
    fp8_modules,
    register_handler,
)
from optimum_fp8.modules import handler as registry
from optimum_fp8.modules.handler import Conversion, Reason, Row, Why, handlers
from optimum_fp8.modules.layer import LAYERS
from optimum_fp8.modules.weight import frozen

CPU = {"target": "cpu"}


@pytest.fixture(autouse=True)
def kinds(monkeypatch):
    """What a test registers is gone after it."""
    monkeypatch.setattr(registry, "_handlers", list(registry._handlers))


# --- two kinds ----------------------------------------------------------------------------------------------------


class FP8Embedding(FP8Module):
    """A table in FP8, of which rows are dequantized."""

    def __init__(self, origin, scheme):
        super().__init__(origin.weight.shape, origin, scheme)

    def forward(self, ids):
        rows = F.embedding(ids, self.codes.view(torch.uint8)).view(self.codes.dtype)
        scale = self.weight_scale
        scale = F.embedding(ids, scale) if scale.numel() > 1 else scale
        return ops.cast_from_fp8(rows, scale, self.high_precision)


class EmbeddingHandler(LayerHandler):
    """Tables have no activations: nothing is observed, whatever the scheme."""

    def __init__(self):
        super().__init__("embedding", (nn.Embedding,), FP8Embedding)

    def observe(self, target, observers):
        pass

    def missing(self, target):
        return None

    def convert(self, target, model, quantize):
        made = self.empty(target)
        made.set_weight(*quantize(target.module.weight, target.module.weight.detach(), target.scheme))
        return Conversion(made)

    def row(self, module):
        return Row("weight_only", module.record, "", {"weight_scale": module.weight_scale})


class GainHandler(ModuleHandler):
    """A kind without FP8 arithmetic, which changes in place: the least that a handler can be."""

    kind, types, family = "gain", ("Gain",), LAYERS

    def matches(self, module):
        return type(module).__name__ == "Gain" and not hasattr(module, "fp8_scale")

    def refusal(self, module, scheme, around):
        return Why(Reason.UNFIT, "its gain is zero") if module.gain == 0 else None

    def convert(self, target, model, quantize):
        def apply():
            target.module.fp8_scale = torch.ones(1)

        def undo():
            del target.module.fp8_scale

        return Conversion(apply=apply, undo=undo)

    def converted(self, model):
        return {name: module for name, module in model.named_modules() if hasattr(module, "fp8_scale")}

    def restore(self, module, dtype=None):
        del module.fp8_scale
        return None

    def state(self, module):
        return {"fp8_scale": module.fp8_scale}

    def row(self, module):
        return Row("weight_only", ops.CallRecord(), "", self.state(module)) if hasattr(module, "fp8_scale") else None


class Gain(nn.Module):
    def __init__(self, gain):
        super().__init__()
        self.gain = gain

    def forward(self, x):
        return x * self.gain


class OwnConv(nn.Conv1d):
    """A class that the package does not know."""

    def forward(self, x):
        return nn.functional.conv1d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


def own_net():
    return nn.Sequential(OwnConv(4, 8, 3, padding=1), nn.ReLU(), OwnConv(8, 2, 1), nn.Flatten(), nn.Linear(20, 3))


def register_own():
    return register_handler(LayerHandler("own conv", (OwnConv,), FP8Conv))


# --- a layer of another package --------------------------------------------------------------------------------------


def test_before_it_is_registered_the_kind_is_left_alone():
    model = convert(own_net(), FP8Config(activation_scheme="dynamic", **CPU))
    assert list(fp8_modules(model)) == ["4"] and type(model[0]) is OwnConv
    assert quantization_report(model).modules[0].reason == "OwnConv has a forward of its own"


@pytest.mark.core
@pytest.mark.parametrize("scheme", ["static", "dynamic", "weight_only"])
def test_a_layer_from_outside_goes_through_every_step(scheme):
    register_own()
    torch.manual_seed(1)
    model, x = own_net(), torch.randn(5, 4, 10)
    expected, config = model(x), FP8Config(activation_scheme=scheme, **CPU)
    assert [each.name for each in state_of(prepare(copy.deepcopy(model), config)).decisions if each.selected] == [
        "0",
        "2",
        "4",
    ]
    other = copy.deepcopy(model)
    prepare(model, config)
    model(x)
    convert(model)
    assert {name: type(module) for name, module in fp8_modules(model).items()} == {
        "0": FP8Conv,
        "2": FP8Conv,
        "4": FP8Linear,
    }
    assert model[0].weight.shape == (8, 4, 3) and model[0].activations == scheme
    assert ((model(x) - expected).norm() / expected.norm()).item() < 0.1
    rows = {row.name: row for row in quantization_report(model).modules}
    assert rows["0"].quantized and rows["0"].type == "OwnConv" and sum(rows["0"].kernels.values()) == 1
    assert {record.kind for record in checkpoint_of(model).records} == {"own conv", "linear"}

    prepare(other, config)
    other(x * 3)
    convert(other)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x), model(x))
    weight = model[0].dequantized_weight(torch.float32)
    dequantize(model)
    assert type(model[0]) is OwnConv and torch.equal(model[0].weight, weight) and model[0].padding == (1,)


def test_static_ranges_are_those_of_its_input():
    register_own()
    model, x = prepare(own_net(), FP8Config(activation_scheme="static", **CPU)), torch.randn(5, 4, 10)
    model(x)
    assert finalize_calibration(model).range("0") == x.abs().max()


def test_lists_of_the_configuration_know_its_type():
    register_own()
    model = convert(own_net(), FP8Config(activation_scheme="dynamic", blocklist={"types": ["OwnConv"]}))
    assert list(fp8_modules(model)) == ["4"]
    model = convert(own_net(), FP8Config(activation_scheme="dynamic", allowlist={"types": ["OwnConv"]}))
    assert list(fp8_modules(model)) == ["0", "2"]
    overrides = {"^0$": {"fp8_config": "E5M2"}}
    model = convert(own_net(), FP8Config(activation_scheme="dynamic", overrides=overrides))
    assert (model[0].codes.dtype, model[2].codes.dtype) == (torch.float8_e5m2, torch.float8_e4m3fn)


# --- tables -------------------------------------------------------------------------------------------------------


@pytest.mark.core
@pytest.mark.parametrize("method", ["maxabs_pow2", "maxabs_pcs_pow2"])
def test_a_table_that_needs_no_ranges(method):
    register_handler(EmbeddingHandler())
    ids, model = torch.randint(0, 30, (2, 7)), nn.Sequential(nn.Embedding(30, 16), nn.Linear(16, 4))
    original = model[0].weight.detach().clone()
    config = FP8Config(scale_method=method, **CPU)
    model = prepare(model, config)
    model(ids)
    convert(model)
    assert type(model[0]) is FP8Embedding and model[0].codes.dtype == torch.float8_e4m3fn
    assert torch.equal(model[0](ids), F.embedding(ids, model[0].dequantized_weight(torch.float32)))
    assert torch.allclose(model[0](ids), F.embedding(ids, original), rtol=2**-4, atol=1e-3)
    rows = {row.name: row for row in quantization_report(model).modules}
    assert (rows["0"].type, rows["0"].quantized, rows["0"].activations) == ("Embedding", True, "weight_only")
    other = prepare(nn.Sequential(nn.Embedding(30, 16), nn.Linear(16, 4)), config)
    other(ids)
    convert(other).load_state_dict(model.state_dict())
    assert torch.equal(other(ids), model(ids))
    assert torch.equal(dequantize(model)[0].weight, other[0].dequantized_weight(torch.float32))
    assert type(model[0]) is nn.Embedding and not hasattr(model[0], "bias")


def test_a_table_tied_to_a_layer_shares_its_codes():
    register_handler(EmbeddingHandler())
    model = nn.ModuleDict({"table": nn.Embedding(8, 4), "head": nn.Linear(4, 8, bias=False)})
    model["head"].weight = model["table"].weight
    convert(model, FP8Config(activation_scheme="dynamic", **CPU))
    assert model["head"].codes is model["table"].codes and model["head"].weight_scale is model["table"].weight_scale


# --- in place -----------------------------------------------------------------------------------------------------


def test_the_least_a_handler_can_be():
    register_handler(GainHandler())
    model = nn.Sequential(Gain(2), Gain(0), nn.Linear(4, 4))
    convert(model, FP8Config(activation_scheme="dynamic", **CPU))
    assert hasattr(model[0], "fp8_scale") and not hasattr(model[1], "fp8_scale")
    rows = {row.name: row for row in quantization_report(model).modules}
    assert (rows["0"].quantized, rows["0"].weight_scale, rows["1"].reason) == (True, None, "its gain is zero")
    assert [record.name for record in checkpoint_of(model).records if record.kind == "gain"] == ["0"]
    dequantize(model)
    assert not hasattr(model[0], "fp8_scale") and type(model[2]) is nn.Linear


def test_what_it_did_in_place_is_undone_after_an_error():
    register_handler(GainHandler())
    model = nn.Sequential(Gain(2), nn.Linear(4, 4))
    with torch.no_grad():
        model[1].weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="^1: the weight holds NaN"):
        convert(model, FP8Config(activation_scheme="dynamic", **CPU))
    assert not hasattr(model[0], "fp8_scale") and state_of(model) is None


def test_a_kind_that_misses_its_ranges_says_so_in_the_words_of_its_family():
    class Wanting(GainHandler):
        def missing(self, target):
            return Why(Reason.NEVER_REACHED)

    register_handler(Wanting())
    model, x = nn.Sequential(Gain(2), nn.Linear(4, 4)), torch.ones(1, 4)
    prepare(model, FP8Config(activation_scheme="static", **CPU))(x)
    with pytest.raises(
        FP8MeasurementError, match=rf"1 {LAYERS.noun} were never reached by calibration: 0: {LAYERS.reaching[:20]}"
    ):
        convert(model)


# --- the registry -------------------------------------------------------------------------------------------------


def test_the_last_registered_is_asked_first_and_one_of_the_same_kind_is_replaced():
    before = len(handlers())
    first = register_own()
    assert handlers()[0] is first and len(handlers()) == before + 1
    second = register_own()
    assert handlers()[0] is second and first not in handlers() and len(handlers()) == before + 1


def test_a_kind_may_take_modules_from_one_that_is_there():
    class Mine(nn.Linear):
        pass

    class FP8Mine(FP8Linear):
        pass

    register_handler(LayerHandler("mine", (Mine,), FP8Mine))
    model = convert(nn.Sequential(Mine(4, 4), nn.Linear(4, 4)), FP8Config(activation_scheme="dynamic", **CPU))
    assert [type(module) for module in model] == [FP8Mine, FP8Linear]
    assert {record.name: record.kind for record in checkpoint_of(model).records} == {"0": "mine", "1": "linear"}
    dequantize(model)
    assert [type(module) for module in model] == [Mine, nn.Linear]


def test_copies_of_a_model_share_handlers():
    assert all(copy.deepcopy(each) is each for each in handlers())


def test_the_list_that_is_handed_out_is_a_copy():
    handlers().clear()
    assert handlers()


def test_a_kind_that_does_not_say_how_keeps_its_scales():
    register_handler(GainHandler())
    model = convert(nn.Sequential(Gain(2.0), nn.Linear(4, 4)), FP8Config(activation_scheme="dynamic", **CPU))
    (target,) = (each for each in state_of(model).targets(model) if each.name == "0")
    with pytest.raises(FP8NotAvailableError, match="0: 'gain' modules keep their scales: quantize the original"):
        target.handler.rescheme(target, lambda codes, scale, scheme: (codes, scale))


def test_a_layer_takes_another_scheme_in_place():
    config = FP8Config(activation_scheme="dynamic", **CPU)
    model = convert(nn.Sequential(nn.Linear(4, 4)), config)
    (target,) = state_of(model).targets(model)
    scheme = replace(target.scheme, activations="weight_only")
    doubled = []

    def fit(codes, scale, given):
        doubled.append(given)
        return codes, frozen(scale * 2)

    before = model[0].weight_scale.clone()
    target.handler.rescheme(replace(target, scheme=scheme), fit)
    assert doubled == [scheme] and model[0].scheme == scheme and model[0].activations == "weight_only"
    assert torch.equal(model[0].weight_scale, before * 2)
