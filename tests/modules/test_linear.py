"""FP8Linear: a product of rounded values, for nn.Linear and for Conv1D, whose weight lies the other way round."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from optimum_fp8 import FP8Config, convert, dequantize, prepare
from optimum_fp8.modules import FP8Linear

E4M3 = torch.float8_e4m3fn


def made(layer, x, **options):
    model = prepare(nn.Sequential(layer), FP8Config(**{"target": "cpu", **options}))
    model(x)
    return convert(model)[0]


def rounded(x, scale, full_scale=448.0, dtype=E4M3):
    return (x.float() * (1 / scale)).clamp(-full_scale, full_scale).to(dtype).float() * scale


def reference(module, x, bias=True):
    """In float64, so that only the roundings to FP8 are left."""
    fmt = module.scheme.fmt
    scale = module.activation_scale(x)
    seen = x.float() if scale is None else rounded(x, scale, fmt.full_scale, fmt.dtype)
    y = seen.double() @ (module.codes.float() * module.weight_scale).double().T
    return (y + module.bias.double() if bias and module.bias is not None else y).float()


@pytest.mark.core
@pytest.mark.parametrize("layer", [nn.Linear(24, 16), nn.Linear(24, 16, bias=False), Conv1D(16, 24)], ids=str)
@pytest.mark.parametrize("scheme", ["static", "dynamic", "weight_only"])
@pytest.mark.parametrize("method", ["maxabs_hw", "act_maxabs_pow2_weights_pcs_maxabs_pow2"])
@pytest.mark.parametrize("target", ["cpu", "gaudi2"])
@torch.no_grad()
def test_it_is_the_product_of_rounded_values(layer, scheme, method, target):
    x = torch.randn(3, 5, 24)
    module = made(copy.deepcopy(layer), x, activation_scheme=scheme, scale_method=method, target=target)
    assert module.codes.shape == (16, 24) and module.weight.shape == layer.weight.shape
    torch.testing.assert_close(module(x), reference(module, x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(24,), (1, 24), (2, 3, 4, 24), (0, 24)])
def test_any_leading_dimensions(shape):
    module, x = made(nn.Linear(24, 16), torch.randn(4, 24)), torch.randn(shape)
    assert module(x).shape == (*shape[:-1], 16)
    with torch.no_grad():
        torch.testing.assert_close(module(x), reference(module, x), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_dynamic_scales_are_of_each_token_where_the_method_says_so():
    x = torch.randn(2, 3, 24) * torch.tensor([1.0, 100.0, 0.01])[:, None]
    module = made(nn.Linear(24, 16, bias=False), x, scale_method="maxabs_pcs_pow2")
    assert module.activation_scale(x).shape == (2, 3, 1)
    alone = torch.stack([module(row) for row in x.flatten(0, 1)]).reshape(2, 3, 16)
    assert torch.equal(module(x), alone), "a row does not depend on its neighbours"


def test_conv1d_and_linear_of_the_same_weight_compute_the_same():
    linear, conv1d, x = nn.Linear(24, 16), Conv1D(16, 24), torch.randn(4, 24)
    with torch.no_grad():
        conv1d.weight.copy_(linear.weight.T)
        conv1d.bias.copy_(linear.bias)
    one, other = made(linear, x), made(conv1d, x)
    assert torch.equal(one(x), other(x)) and torch.equal(one.codes.view(torch.uint8), other.codes.view(torch.uint8))


def test_dequantized_conv1d_lies_the_other_way_round_again():
    model = convert(nn.Sequential(Conv1D(16, 24)), FP8Config(activation_scheme="weight_only"))
    values = model[0].dequantized_weight(torch.float32)
    dequantize(model)
    assert type(model[0]) is Conv1D and model[0].weight.shape == (24, 16) and model[0].weight.is_contiguous()
    assert torch.equal(model[0].weight, values.T)


@torch.no_grad()
def test_values_beyond_the_calibrated_range_saturate():
    module = made(nn.Linear(2, 1, bias=False), torch.ones(1, 2))
    with torch.no_grad():
        module.weight_scale.fill_(1.0)
        module.codes.copy_(torch.ones(1, 2).to(E4M3))
    assert module(torch.full((1, 2), 1e30)).item() == 2 * 448 * module.input_scale.item()


def test_its_text_says_what_it_is():
    module = made(nn.Linear(24, 16, bias=False), torch.ones(1, 24), fp8_config="E5M2", target="gaudi3")
    assert repr(module) == "FP8Linear(24, 16, bias=False, E5M2 on gaudi3, weight per tensor, activations static)"
    assert isinstance(module, FP8Linear)


def test_a_token_does_not_depend_on_its_batch_where_nothing_else_is_said():
    plain = nn.Sequential(nn.Linear(24, 16)).bfloat16()
    module = convert(plain, FP8Config(activation_scheme="dynamic", quantize_lm_head=True))
    x = torch.randn(5, 24).bfloat16()
    x[3] *= 1000
    assert torch.equal(module(x)[:1], module(x[:1]))
