"""Convolutions that standardize their weights: transformers' BiT with the weights that result, in FP8."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import BitConfig, BitForImageClassification

from optimum_fp8 import FP8Config, convert, dequantize, quantization_report
from optimum_fp8.modules import fp8_modules
from optimum_fp8.modules.standardized_conv import FP8StandardizedConv2d

X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(2))
SIZES = {"embedding_size": 32, "hidden_sizes": [32, 64], "depths": [1, 1], "num_labels": 3, "num_groups": 4}


def tiny_bit(**keys):
    torch.manual_seed(0)
    return BitForImageClassification(BitConfig(**SIZES, **keys)).eval()


@pytest.mark.parametrize("padding", [None, "same"])
@torch.no_grad()
def test_it_is_the_model_with_standardized_weights_rounded(padding):
    model = tiny_bit(global_padding=padding)
    expected = copy.deepcopy(model)
    convert(model, FP8Config(target="cpu", activation_scheme="weight_only"))
    layers = [layer for layer in fp8_modules(model).values() if isinstance(layer, FP8StandardizedConv2d)]
    assert len(layers) >= 6 and any(layer.pad is not None for layer in layers) == (padding == "same")
    assert {row.type for row in quantization_report(model).quantized} == {"WeightStandardizedConv2d"}
    for name, layer in fp8_modules(model).items():
        plain = expected.get_submodule(name)
        rows = plain.weight.flatten(1)
        shifted = rows - rows.mean(dim=1, keepdim=True)
        standardized = shifted / (rows.var(dim=1, keepdim=True, unbiased=False) + plain.eps).sqrt()
        torch.testing.assert_close(
            layer.dequantized_weight(torch.float32).flatten(1), standardized, rtol=0.07, atol=0.02
        )
        x = torch.randn(1, plain.in_channels, 9, 9)
        plain.weight.copy_(layer.dequantized_weight(torch.float32))
        padded = x if plain.pad is None else plain.pad(x)
        by_torch = torch.nn.functional.conv2d(
            padded, plain.weight, None, plain.stride, plain.padding, plain.dilation, plain.groups
        )
        torch.testing.assert_close(layer(x), by_torch, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_quantized_while_loading_saved_and_loaded_to_the_bit(tmp_path):
    tiny_bit().save_pretrained(tmp_path / "plain")
    config = FP8Config(target="cpu", activation_scheme="weight_only")
    model = BitForImageClassification.from_pretrained(tmp_path / "plain", quantization_config=config)
    expected = model(X).logits
    by_hand = convert(tiny_bit(), config)
    assert torch.equal(by_hand(X).logits, expected)
    model.save_pretrained(tmp_path / "fp8")
    again = BitForImageClassification.from_pretrained(tmp_path / "fp8")
    assert len(fp8_modules(again)) == len(fp8_modules(model)) and torch.equal(again(X).logits, expected)
    plain = dequantize(again)
    assert not fp8_modules(plain)
    torch.testing.assert_close(plain(X).logits, expected, rtol=1e-4, atol=1e-4)
