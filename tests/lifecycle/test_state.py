"""FP8State: kept on the model, copied with it, and asked for by each step."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_models import tiny_llama
from torch import nn

from optimum_fp8 import FP8Config, convert, prepare
from optimum_fp8.errors import FP8ConfigError, FP8StateError
from optimum_fp8.lifecycle import Phase, refuse_second_time, set_state, state_of
from optimum_fp8.lifecycle.state import measuring_state
from optimum_fp8.modules.handler import Reason

STATIC = {"activation_scheme": "static", "target": "cpu"}


def net():
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3))


def test_it_is_no_part_of_the_models_own_state():
    model = prepare(net(), FP8Config(**STATIC))
    state = state_of(model)
    assert state.phase is Phase.MEASURING and state.selected == ["0", "2"]
    assert list(model.state_dict()) == list(net().state_dict()) and [
        name for name, _ in model.named_children()
    ] == list("012")
    set_state(model, None)
    assert state_of(model) is None
    set_state(model, None)


@pytest.mark.core
def test_a_copy_of_a_measuring_model_goes_its_own_way():
    model = prepare(net(), FP8Config(**STATIC))
    model(torch.ones(1, 4))
    clone = copy.deepcopy(model)
    assert state_of(clone) is not state_of(model) and state_of(clone).config == state_of(model).config
    clone(torch.full((1, 4), 8.0))
    assert (state_of(model).measurements.range("0"), state_of(clone).measurements.range("0")) == (1.0, 8.0)
    convert(clone)
    assert state_of(clone).phase is Phase.CONVERTED and state_of(model).phase is Phase.MEASURING
    model(torch.full((1, 4), 3.0))
    assert state_of(model).measurements.range("0") == 3.0
    convert(model)
    assert model[0].input_scale < clone[0].input_scale


def test_a_copy_of_a_measuring_model_with_attention_goes_its_own_way():
    ids = torch.arange(3, 12)[None]
    model = prepare(tiny_llama(), FP8Config(attention=True, kv_cache=True, **STATIC))
    clone = copy.deepcopy(model)
    clone(ids)
    name = "model.layers.0.self_attn"
    assert "q" in state_of(clone).measurements.at(name).kinds and not state_of(model).measurements.at(name).kinds
    convert(clone)(ids)
    model(ids)
    convert(model)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, clone(ids).logits)


def test_targets_are_the_selected_modules_with_their_ranges():
    config = FP8Config(blocklist={"names": ["2"]}, **STATIC)
    model = prepare(net(), config)
    model(torch.full((1, 4), 5.0))
    (target,) = state_of(model).targets(model)
    assert (target.name, target.module, target.handler.kind) == ("0", model[0], "linear")
    assert target.ranges.of("input") == 5.0 and target.scheme.is_static
    left_out = state_of(model).decisions[1]
    assert (left_out.selected, left_out.why.reason, left_out.reason) == (False, Reason.EXCLUDED, "blocklist name '2'")


@pytest.mark.parametrize("reason", Reason)
def test_every_reason_has_a_text_of_its_own(reason):
    assert reason.value and [each.value for each in Reason].count(reason.value) == 1


def test_a_phase_is_its_word():
    assert (str(Phase.MEASURING), f"{Phase.CONVERTED}") == ("measuring", "converted")


@pytest.mark.parametrize("action", ["convert", "finalize"])
def test_steps_out_of_order_are_named(action):
    with pytest.raises(FP8StateError, match=rf"^{action}: this model is not being measured: call prepare"):
        measuring_state(net(), action)
    with pytest.raises(FP8StateError, match=rf"^{action}: this model is already converted"):
        measuring_state(convert(net(), FP8Config(activation_scheme="dynamic")), action)
    with pytest.raises(FP8StateError, match=rf"^{action}: expected a torch.nn.Module, found dict"):
        refuse_second_time({}, action)
    with pytest.raises(FP8ConfigError, match=rf"^{action}: expected an FP8Config, found {{}}"):
        refuse_second_time(net(), action, {})
