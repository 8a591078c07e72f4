"""Layers in training compute their own forward of rounded operands, and in evaluation what they are converted to."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from optimum_fp8 import FP8Config, convert, ops, prepare
from optimum_fp8.errors import FP8NotAvailableError


class Padded(nn.Conv1d):
    """A forward of its own around the product of its class."""

    def forward(self, x):
        return super().forward(F.pad(x, (2, 0)))


class ScaledEmbedding(nn.Embedding):
    def forward(self, ids):
        return super().forward(ids) * 2.0


IDS = torch.arange(8).reshape(2, 4)
LAYERS = {
    "linear": (lambda: nn.Linear(256, 128), (2, 3, 256)),
    "conv1d of transformers": (lambda: Conv1D(128, 256), (2, 3, 256)),
    "conv": (lambda: nn.Conv2d(4, 8, 3, padding=1, groups=2), (2, 4, 6, 6)),
    "transposed conv": (lambda: nn.ConvTranspose2d(4, 8, 3, stride=2), (2, 4, 5, 5)),
    "own forward": (lambda: Padded(4, 8, 3), (2, 4, 9)),
    "embedding": (lambda: nn.Embedding(16, 32), None),
    "embedding with a forward of its own": (lambda: ScaledEmbedding(16, 32), None),
}
SCHEMES = {
    "static": {},
    "static pow2 E5M2": {"scale_method": "maxabs_pow2", "fp8_config": "E5M2"},
    "unit": {"scale_method": "unit_scale", "fp8_config": "E5M2"},
    "delayed": {"amax_history_len": 4},
    "frozen": {"freeze_scales_at": 2, "scale_method": "maxabs_arbitrary"},
    "dynamic": {"activation_scheme": "dynamic"},
    "weight only": {"activation_scheme": "weight_only"},
    "channels": {"scale_method": "act_maxabs_hw_weights_pcs_maxabs_pow2"},
    "search": {"scale_method": "maxabs_pow2_opt_weight"},
    "gaudi2": {"target": "gaudi2"},
    "qdq": {"use_qdq": True},
}
OF_MATRICES = {"blocks": FP8Config.preset("FP8_BLOCK").scale_method, "groups": FP8Config.preset("MXFP8").scale_method}


def trained(layer, shape, steps=3, **options):
    torch.manual_seed(0)
    model = prepare(
        nn.Sequential(layer, nn.Identity()), FP8Config(**options, fake_quant=True, quantize_embeddings=True)
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(steps):
        model(inputs(shape)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def inputs(shape):
    return IDS if shape is None else torch.randn(shape)


FOR_ALL = ("static", "frozen", "dynamic", "channels")
CASES = [(kind, options) for kind in LAYERS for options in (SCHEMES if kind == "linear" else FOR_ALL)]
CASES += [(kind, options) for kind in ("linear", "conv1d of transformers") for options in OF_MATRICES]


@pytest.mark.core
@pytest.mark.parametrize("kind, name", CASES)
@torch.no_grad()
def test_what_is_evaluated_is_what_is_converted_to_the_bit(kind, name):
    make, shape = LAYERS[kind]
    options = SCHEMES.get(name) or ({"scale_method": OF_MATRICES[name]} if name in OF_MATRICES else {})
    with torch.enable_grad():
        model = trained(make(), shape, **{"target": "cpu", **options})
    x = inputs(shape)
    with ops.backend("reference"):
        evaluated = model.eval()(x)
        assert torch.equal(convert(model)(x), evaluated)
    assert type(model[0]).__name__.startswith("FP8") and "fake_quant" not in model[0]._modules
    assert not any("fake_quant" in name or "frozen" in name for name in model.state_dict())


@pytest.mark.parametrize("kind", LAYERS)
def test_a_step_has_the_gradients_of_the_rounded_operands(kind):
    """The oracle: the plain layer, in float64, of weight and input as converted; what saturates has no gradient."""
    torch.manual_seed(0)
    make, shape = LAYERS[kind]
    layer = make()
    plain = copy.deepcopy(layer).double()
    config = FP8Config(fake_quant=True, quantize_embeddings=True, scale_method="unit_scale", target="cpu")
    with torch.no_grad():
        layer.weight.view(-1)[:5] = 500.0  # saturates
    model = prepare(nn.Sequential(layer, nn.Identity()), config)
    x = inputs(shape)
    if shape is not None:
        x.view(-1)[:3] = torch.tensor([449.0, -1000.0, 448.0])
        x.requires_grad_()
    model(x).square().sum().backward()

    def rounded(values):
        return values.detach().clamp(-448, 448).to(torch.float8_e4m3fn).double()

    with torch.no_grad():
        plain.weight.copy_(rounded(layer.weight))
    given = x if shape is None else rounded(x).requires_grad_()
    plain(given).square().sum().backward()
    within = layer.weight.detach().abs() <= 448
    torch.testing.assert_close(layer.weight.grad.double(), plain.weight.grad * within, rtol=1e-4, atol=1e-2)
    assert not layer.weight.grad.view(-1)[:5].any()
    if shape is not None:
        expected = given.grad * (x.detach().abs() <= 448)
        torch.testing.assert_close(x.grad.double(), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
        assert x.grad.view(-1)[:2].tolist() == [0, 0] and x.grad.view(-1)[2] != 0


def test_gradients_in_evaluation_are_those_of_training():
    model, x = trained(nn.Linear(16, 8), (4, 16), scale_method="unit_scale"), torch.randn(4, 16)
    found = []
    for mode in (True, False):
        model.train(mode).zero_grad()
        output = model(x)
        output.sum().backward()
        found.append([parameter.grad.clone() for parameter in model.parameters()])
    assert all(torch.equal(trained, evaluated) for trained, evaluated in zip(*found, strict=True))
    with torch.no_grad():
        assert torch.equal(model(x), output)


def test_inputs_by_name_and_autocast():
    model = prepare(nn.Sequential(nn.Linear(16, 8), nn.Identity()), FP8Config(fake_quant=True, target="cpu"))
    x = torch.randn(4, 16)
    assert torch.equal(model[0](input=x), model[0](x))
    with torch.autocast("cpu", torch.bfloat16):
        output = model(x)
        assert output.dtype == torch.bfloat16
        output.float().sum().backward()
        with torch.no_grad(), ops.backend("reference"):
            evaluated = model.eval()(x)
            assert torch.equal(convert(model)(x), evaluated) and evaluated.dtype == torch.bfloat16


def test_normalized_weights_are_refused():
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(16, 8)), nn.Linear(8, 8))
    with pytest.raises(FP8NotAvailableError, match="0: fake_quant=True cannot train a ParametrizedLinear"):
        prepare(model, FP8Config(fake_quant=True))
    assert "fake_quant" not in model[1]._modules
