"""Layers with weight normalization: quantized as the plain layers that they are in inference, and restored with it."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils import weight_norm as by_hook
from transformers import HubertConfig, HubertModel

from optimum_fp8 import FP8Config, convert, dequantize, prepare, quantization_report
from optimum_fp8.modules import fp8_modules

LAYERS = {
    "Linear": (lambda: nn.Linear(8, 6), (5, 8)),
    "Conv1d": (lambda: nn.Conv1d(4, 8, 3, groups=2, padding=1), (2, 4, 9)),
    "ConvTranspose1d": (lambda: nn.ConvTranspose1d(4, 8, 4, stride=2, padding=1), (2, 4, 9)),
}
WAYS = {"hook": by_hook, "parametrization": parametrizations.weight_norm}
KEYS = {"target": "cpu", "activation_scheme": "weight_only"}


def normed(way, layer, dim=0):
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of torch, about the older way
        module = WAYS[way](LAYERS[layer][0](), dim=dim)
    with torch.no_grad():
        length = module.weight_g if way == "hook" else module.parametrizations.weight.original0
        length.mul_(torch.rand_like(length) + 0.5)  # no longer what it is right after it was made
    return module


@pytest.mark.parametrize("dim", [0, 2, None])
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("way", WAYS)
@torch.no_grad()
def test_the_effective_weight_is_quantized(way, layer, dim):
    if layer == "Linear" and dim == 2:
        dim = 1
    module, x = normed(way, layer, dim), torch.randn(LAYERS[layer][1])
    model, expected = nn.Sequential(module), module(x)
    convert(model, FP8Config(**KEYS))
    found = fp8_modules(model)["0"]
    plain = LAYERS[layer][0]()
    plain.load_state_dict({"weight": found.weight.clone(), "bias": module.bias})
    torch.testing.assert_close(model(x), plain(x), rtol=1e-4, atol=1e-5)
    assert ((model(x) - expected).norm() / expected.norm()).item() < 0.06
    assert set(model.state_dict()) == {"0.weight", "0.weight_scale", "0.bias"}
    assert quantization_report(model).quantized[0].type.endswith(layer)


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("way", WAYS)
@torch.no_grad()
def test_dequantized_it_is_normed_again(way, layer):
    model, x = nn.Sequential(normed(way, layer)), torch.randn(LAYERS[layer][1])
    names = set(model.state_dict())
    prepare(model, FP8Config(target="cpu"))
    model(x)
    convert(model)
    weight = model[0].weight.clone()
    copied = copy.deepcopy(model)
    assert torch.equal(copied(x), model(x))
    for each in (model, copied):
        dequantize(each)
        assert set(each.state_dict()) == names and isinstance(each[0], getattr(nn, layer))
        each(x)
        torch.testing.assert_close(each[0].weight, weight)
        length = each[0].weight_g if way == "hook" else each[0].parametrizations.weight.original0
        length.mul_(2)
        each(x)
        torch.testing.assert_close(each[0].weight, 2 * weight)


@pytest.mark.parametrize("way", WAYS)
@torch.no_grad()
def test_a_channel_of_zeros_stays_one(way):
    model, x = nn.Sequential(normed(way, "Conv1d")), torch.randn(LAYERS["Conv1d"][1])
    length = model[0].weight_g if way == "hook" else model[0].parametrizations.weight.original0
    length.view(-1)[0] = 0
    convert(model, FP8Config(target="cpu", activation_scheme="weight_only"))
    expected = model(x)
    torch.testing.assert_close(dequantize(model)(x), expected)


@torch.no_grad()
def test_an_error_leaves_the_norm_as_it_was():
    model = nn.Sequential(normed("hook", "Conv1d"), nn.Linear(9, 2))
    x = torch.randn(2, 4, 9)
    expected = model(x)
    model[1].weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        convert(model, FP8Config(**KEYS))
    model[1].weight[0, 0] = 0.0
    model[0].weight_g.mul_(2)
    assert model(x).shape == expected.shape and len(model[0]._forward_pre_hooks) == 1


def test_other_parametrizations_stay_in_high_precision():
    torch.manual_seed(0)
    spectral = parametrizations.spectral_norm(nn.Linear(8, 8))
    both = parametrizations.weight_norm(parametrizations.spectral_norm(nn.Linear(8, 8)))
    model = convert(nn.Sequential(spectral, both, nn.Linear(8, 8)), FP8Config(**KEYS))
    assert list(fp8_modules(model)) == ["2"]
    reasons = {row.name: row.reason for row in quantization_report(model).modules}
    assert reasons["0"] == reasons["1"] == "its weight is parametrized"
    assert parametrize.is_parametrized(model[0])


@torch.no_grad()
def test_while_loading_saved_and_loaded_to_the_bit(tmp_path):
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 32}
    sizes |= {"conv_dim": [16, 16], "conv_stride": [2, 2], "conv_kernel": [3, 3], "num_conv_pos_embeddings": 4}
    torch.manual_seed(0)
    HubertModel(HubertConfig(**sizes, num_conv_pos_embedding_groups=4, num_feat_extract_layers=2)).save_pretrained(
        tmp_path / "plain"
    )
    x = torch.randn(2, 200)
    model = HubertModel.from_pretrained(tmp_path / "plain", quantization_config=FP8Config(**KEYS)).eval()
    assert "encoder.pos_conv_embed.conv" in fp8_modules(model)
    plain = HubertModel.from_pretrained(tmp_path / "plain").eval()
    expected = model(x).last_hidden_state
    assert torch.equal(convert(copy.deepcopy(plain), FP8Config(**KEYS))(x).last_hidden_state, expected)
    model.save_pretrained(tmp_path / "fp8")
    again = HubertModel.from_pretrained(tmp_path / "fp8").eval()
    assert torch.equal(again(x).last_hidden_state, expected)
    dequantize(again).save_pretrained(tmp_path / "again")
    last = HubertModel.from_pretrained(tmp_path / "again").eval()
    torch.testing.assert_close(last(x).last_hidden_state, expected, rtol=1e-3, atol=1e-3)
