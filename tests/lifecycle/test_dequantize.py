"""Dequantizing: original classes, ties and dtypes, from any state, and what cannot be."""

from __future__ import annotations

import pytest
import torch
from tiny_models import tiny_llama
from torch import nn

from optimum_fp8 import FP8Config, convert, dequantize, prepare
from optimum_fp8.attention import plan_of, scales_of
from optimum_fp8.errors import FP8NotAvailableError
from optimum_fp8.lifecycle import state_of
from optimum_fp8.modules import fp8_modules

IDS = torch.arange(3, 12)[None]


def net():
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Conv2d(1, 2, 1))


def test_a_model_that_was_never_touched_stays_as_it_is():
    model = net()
    before = list(model.modules())
    assert dequantize(model) is model and list(model.modules()) == before


@pytest.mark.core
def test_a_measuring_model_is_itself_again():
    model = tiny_llama()
    before, implementation = list(model.named_modules()), model.config._attn_implementation
    with torch.no_grad():
        expected = model(IDS).logits
        prepare(model, FP8Config(attention=True, kv_cache=True))
        model(IDS)
        dequantize(model)
        assert torch.equal(model(IDS).logits, expected)
    assert list(model.named_modules()) == before and model.config._attn_implementation == implementation
    assert state_of(model) is None and not any(plan_of(module) for module in model.modules())
    prepare(model, FP8Config())


@pytest.mark.core
@pytest.mark.parametrize("dtype", [None, torch.float32, torch.float16])
def test_weights_are_the_values_of_their_codes(dtype):
    model = net().to(torch.bfloat16)
    convert(model, FP8Config(activation_scheme="dynamic", overrides={"^2$": {"fp8_config": "E5M2"}}))
    values = {name: module.dequantized_weight(dtype or torch.bfloat16) for name, module in fp8_modules(model).items()}
    dequantize(model, dtype)
    assert [type(module) for module in model] == [nn.Linear, nn.ReLU, nn.Conv2d]
    for name, expected in values.items():
        weight = model.get_submodule(name).weight
        assert torch.equal(weight, expected) and weight.dtype == expected.dtype and weight.requires_grad


def test_attention_and_caches_are_as_they_were():
    model = prepare(tiny_llama(), FP8Config(attention=True, kv_cache=True))
    model(IDS)
    convert(model)
    dequantize(model)
    assert not any(plan_of(module) or scales_of(module) for module in model.modules())
    with torch.no_grad():
        cache = model(IDS, use_cache=True).past_key_values
    assert type(cache.layers[0].keys) is torch.Tensor


def test_a_part_of_a_model():
    model = nn.Sequential(net(), nn.Linear(4, 4))
    convert(model, FP8Config(activation_scheme="dynamic"))
    dequantize(model[0])
    assert list(fp8_modules(model)) == ["1"]


def test_offloaded_weights_are_refused_and_nothing_is_changed():
    model = convert(net(), FP8Config(activation_scheme="dynamic"))
    model[0].to("meta")
    with pytest.raises(FP8NotAvailableError, match="some weights are offloaded"):
        dequantize(model)
    assert len(fp8_modules(model)) == 2 and state_of(model) is not None
