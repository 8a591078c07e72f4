"""Layers of libraries that train in FP8 are refused by name, whenever they come."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_models import tiny_llama
from torch import nn
from transformers import AutoModelForCausalLM

from optimum_fp8 import FP8Config, convert, finalize_calibration, prepare
from optimum_fp8.errors import FP8NotAvailableError


class Float8Linear(nn.Linear):
    """Named as the layer that torchao's `convert_to_float8_training` puts in."""

    __module__ = "torchao.float8.float8_linear"


def trained_in_fp8(model: nn.Module) -> nn.Module:
    for name, module in [*model.named_modules()]:
        if type(module) is nn.Linear:
            new = Float8Linear(module.in_features, module.out_features, bias=False)
            new.weight = module.weight
            model.set_submodule(name, new)
    return model


@pytest.mark.parametrize("action", [prepare, convert])
def test_before(action):
    model = trained_in_fp8(tiny_llama())
    with pytest.raises(FP8NotAvailableError, match=r"layers.0.self_attn.q_proj is a Float8Linear.*save_pretrained"):
        action(model, FP8Config(activation_scheme="dynamic"))


@pytest.mark.parametrize("action", [finalize_calibration, convert])
def test_since_prepare(action, tmp_path):
    model = prepare(tiny_llama(), FP8Config(dump_stats_path=str(tmp_path / "ranges")))
    trained_in_fp8(model)(torch.arange(8)[None])
    with pytest.raises(FP8NotAvailableError, match="Float8Linear of torchao.*quantize what was saved"):
        action(model)


def test_what_was_trained_so_quantizes_as_what_it_is(tmp_path):
    config = FP8Config(activation_scheme="dynamic")
    original = tiny_llama()
    trained_in_fp8(copy.deepcopy(original)).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config)
    expected = convert(original, config)
    ids = torch.arange(8)[None]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, expected(ids).logits)
