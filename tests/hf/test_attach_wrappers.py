"""A module that passes on what it is asked for, as adapters do, is not taken for the model that it wraps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from optimum_fp8 import FP8Config, calibrate, convert, dequantize, finalize_calibration, prepare, quantization_report
from optimum_fp8.errors import FP8StateError
from optimum_fp8.lifecycle import state_of
from optimum_fp8.modules import fp8_modules

from .conftest import llama

CONFIG = FP8Config(activation_scheme="dynamic", quantize_lm_head=True)


class Adapter(nn.Module):
    def __init__(self, model: nn.Module):
        super().__init__()
        self.base_model = model

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base_model"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.base_model(*args, **kwargs)


def converted(model: nn.Module, config: FP8Config) -> nn.Module:
    return convert(model, config) if config.dataset is None else convert(calibrate(prepare(model, config)))


# the model is converted, and wrapped before or after it, once or twice
def inside(model: nn.Module, config: FP8Config) -> nn.Module:
    return Adapter(converted(model, config))


def as_a_whole(model: nn.Module, config: FP8Config) -> nn.Module:
    return converted(Adapter(model), config)


def inside_of_two(model: nn.Module, config: FP8Config) -> nn.Module:
    return Adapter(Adapter(converted(model, config)))


WAYS = [inside, as_a_whole, inside_of_two]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_dequantize(ids, way, tied):
    model = llama(tied)
    before, keys = set(vars(model)), dict(model.all_tied_weights_keys)
    whole = way(model, CONFIG)
    assert dequantize(whole) is whole
    assert not fp8_modules(whole)
    for part in (whole, *whole.modules()):
        assert state_of(part) is None and "hf_quantizer" not in vars(part)
    assert not hasattr(model.config, "quantization_config") and not getattr(model, "is_quantized", False)
    assert "resize_token_embeddings" not in {*vars(model), *vars(whole)} and before <= set(vars(model))
    assert dict(model.all_tied_weights_keys) == keys
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    model.train()(ids, labels=ids).loss.backward()
    assert model.model.layers[0].mlp.up_proj.weight.grad is not None


@pytest.mark.parametrize("way", [inside, inside_of_two])
def test_dequantize_with_attention(ids, way):
    model, config = llama(), FP8Config(attention=True, kv_cache=True, dataset=[{"input_ids": ids}])
    implementation = model.config._attn_implementation
    dequantize(way(model, config))
    assert model.config._attn_implementation == implementation and "init_continuous_batching" not in vars(model)


@pytest.mark.parametrize("way", WAYS)
def test_saving_what_is_inside(tmp_path, ids, way):
    model = llama()
    whole = way(model, CONFIG)
    model.save_pretrained(tmp_path / "fp8")
    again = type(model).from_pretrained(tmp_path / "fp8")
    with torch.no_grad():
        assert torch.equal(again(ids).logits, whole(ids).logits)


@pytest.mark.parametrize("way", WAYS)
def test_the_report_and_a_second_conversion(way):
    whole = way(llama(), CONFIG)
    assert len(quantization_report(whole).quantized) == 15
    with pytest.raises(FP8StateError, match="convert: this model is converted to FP8 already"):
        convert(whole, CONFIG)


def test_measuring_as_a_whole(ids):
    model = llama()
    whole = prepare(Adapter(model), FP8Config(dataset=[{"input_ids": ids}]))
    assert state_of(model) is None and state_of(whole) is not None
    calibrate(whole)
    assert finalize_calibration(whole).samples == 2
    assert len(fp8_modules(convert(whole))) == 14
    assert not fp8_modules(dequantize(whole))


def test_resizing_is_refused_by_the_model_alone():
    whole = as_a_whole(llama(), CONFIG)
    assert "resize_token_embeddings" not in vars(whole)
    assert "resize_token_embeddings" in vars(whole.base_model)
