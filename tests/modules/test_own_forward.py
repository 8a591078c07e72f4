"""Layers whose class has a forward of its own: it runs as it is, around the product in FP8."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from fake_quantization import FULL_SCALE
from torch import nn
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4GroupedLinear
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.models.gemma4.modeling_gemma4 import Gemma4AudioCausalConv1d
from transformers.models.idefics.modeling_idefics import IdeficsDecoupledLinear
from transformers.models.lasr.modeling_lasr import LasrEncoderCTCHead
from transformers.models.moonshine_streaming.modeling_moonshine_streaming import MoonshineStreamingCausalConv1d
from transformers.models.muse_spark.modeling_muse_spark import MuseSparkAudioCausalConv1d
from transformers.models.nemotron_asr_streaming import modeling_nemotron_asr_streaming as nemotron
from transformers.models.parakeet.modeling_parakeet import ParakeetEncoderCTCHead
from transformers.models.perceiver.modeling_perceiver import Conv2dSamePadding
from transformers.models.voxtral_realtime.modeling_voxtral_realtime import VoxtralRealtimeCausalConv1d

from optimum_fp8 import FP8Config, convert, dequantize, load, prepare, quantization_report, save
from optimum_fp8.modules import register_equivalent
from optimum_fp8.modules.grouped_linear import FP8GroupedLinear
from optimum_fp8.modules.own_forward import EQUIVALENTS, is_known, run_own, torch_class

LENGTH, MASK = (2, 4, 9), torch.arange(9)[None] < torch.tensor([[9], [6]])
CASES = {
    "FalconLinear": (lambda: FalconLinear(8, 6), (torch.randn(2, 3, 8),)),
    "IdeficsDecoupledLinear": (lambda: IdeficsDecoupledLinear(8, 6, 3), (torch.randn(2, 3, 8),)),
    "IdeficsDecoupledLinear, plain": (lambda: IdeficsDecoupledLinear(8, 6, bias=False), (torch.randn(2, 8),)),
    "Conv2dSamePadding": (lambda: Conv2dSamePadding(4, 6, 5, stride=2), (torch.randn(2, 4, 9, 7),)),
    "Gemma4": (lambda: Gemma4AudioCausalConv1d(4, 6, 3, dilation=2), (torch.randn(LENGTH),)),
    "Voxtral": (lambda: VoxtralRealtimeCausalConv1d(4, 6, 3, "key", stride=2), (torch.randn(LENGTH),)),
    "MuseSpark": (lambda: MuseSparkAudioCausalConv1d(4, 6, 3, "key"), (torch.randn(LENGTH),)),
    "Moonshine": (lambda: MoonshineStreamingCausalConv1d(4, 6, 3, stride=2), (torch.randn(LENGTH), MASK)),
    "Nemotron 1d": (
        lambda: nemotron.NemotronAsrStreamingEncoderCausalConv1d(4, 4, 3, "key", groups=4),
        (torch.randn(LENGTH),),
    ),
    "Nemotron 2d": (
        lambda: nemotron.NemotronAsrStreamingEncoderCausalConv2D(4, 6, 3, "key", stride=2),
        (torch.randn(2, 4, 9, 8),),
    ),
    "Lasr": (lambda: LasrEncoderCTCHead(8, 6, 1), (torch.randn(2, 3, 8),)),
    "Parakeet": (lambda: ParakeetEncoderCTCHead(8, 6, 1), (torch.randn(2, 3, 8),)),
    "DeepSeek-V4": (lambda: DeepseekV4GroupedLinear(8, 12, 3), (torch.randn(2, 5, 3, 8),)),
}
WEIGHT_ONLY = FP8Config(target="cpu", activation_scheme="weight_only", scale_method="maxabs_pow2")


class Net(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer
        self.eval().requires_grad_(False)

    def forward(self, *args):
        return self.layer(*args)


def first(output):
    return output[0] if isinstance(output, tuple) else output


@pytest.mark.parametrize("name", [name for name in CASES if name != "DeepSeek-V4"])
def test_the_own_forward_around_the_product_is_the_classes_own(name):
    """In float, with the very product of torch's class: a false row of the table fails."""
    make, inputs = CASES[name]
    layer = make()
    assert is_known(type(layer))
    seen = []

    def product(x):
        seen.append(x)
        return torch_class(type(layer)).forward(layer, x)

    expected, found = layer(*inputs), run_own(layer, layer, product, *inputs)
    assert torch.equal(first(found), first(expected)) and len(seen) == 1
    assert type(found) is type(expected)
    zeros = run_own(layer, layer, lambda x: 0 * torch_class(type(layer)).forward(layer, x), *inputs)
    assert not torch.equal(first(zeros), first(expected)), "the product is what it computes with"


def test_every_row_of_the_table_is_tested():
    assert {name.split(",")[0] for name in CASES} >= set(EQUIVALENTS)


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_weights_only(name):
    make, inputs = CASES[name]
    net = convert(Net(make()), WEIGHT_ONLY)
    plain = dequantize(copy.deepcopy(net))
    assert type(plain.layer) is type(make())
    torch.testing.assert_close(first(net(*inputs)), first(plain(*inputs)), rtol=1e-4, atol=1e-5)
    row = quantization_report(net).quantized[0]
    assert row.name == "layer" and sum(row.kernels.values()) and not row.fallbacks


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("scheme", ["static", "dynamic"])
@torch.no_grad()
def test_measured_converted_saved_and_loaded(name, scheme, tmp_path):
    make, inputs = CASES[name]
    net = Net(make())
    expected = first(net(*inputs))
    prepare(net, FP8Config(target="cpu", activation_scheme=scheme, scale_method="maxabs_pow2"))
    assert torch.equal(first(net(*inputs)), expected)
    convert(net)
    found = first(net(*inputs))
    assert "forward" not in vars(net.layer) and found.shape == expected.shape
    assert 0.002 < (found - expected).norm() / expected.norm() < 0.1
    save(net, tmp_path / "fp8")
    again = load(tmp_path / "fp8", Net(make()))
    assert torch.equal(first(again(*inputs)), found)


class Scaled(nn.Linear):
    """What goes into the product is not what comes in, and what is set on the module stays there."""

    def forward(self, x, *, factor=1.0):
        self.calls = getattr(self, "calls", 0) + 1
        return super().forward(8 * x).relu() * factor + self.weight.abs().sum()


def test_ranges_are_those_of_the_product():
    net, x = Net(Scaled(8, 6)), torch.randn(3, 8)
    prepare(net, FP8Config(target="cpu", scale_method="maxabs_pow2"))
    net(x)
    convert(net)
    scale = net.layer.input_scale
    assert scale == torch.exp2(torch.log2(8 * x.abs().max() / (FULL_SCALE / 4)).ceil())
    rounded = (8 * x / scale).to(torch.float8_e4m3fn).float() * scale
    expected = F.linear(rounded, net.layer.weight.clone(), net.layer.bias).relu() * 2 + net.layer.weight.abs().sum()
    torch.testing.assert_close(net.layer(x, factor=2.0), expected)
    assert net.layer.calls == 2 and net.layer.origin is not None
    assert dequantize(net).layer.calls == 2 and type(net.layer) is Scaled


class OtherWeight(nn.Conv2d):
    """A product with something else than its own weight is no product of the FP8 module."""

    def forward(self, x):
        return self._conv_forward(x, 2 * self.weight, self.bias) + self._conv_forward(x, self.weight, self.bias)


def test_a_product_with_another_weight_is_computed_with_that():
    net, x = convert(Net(OtherWeight(4, 6, 3)), WEIGHT_ONLY), torch.randn(2, 4, 5, 5)
    plain = dequantize(copy.deepcopy(net))
    torch.testing.assert_close(net(x), plain(x), rtol=1e-4, atol=1e-5)
    assert sum(quantization_report(net).quantized[0].kernels.values()) == 1


class Functional(nn.Linear):
    def forward(self, x):
        return F.linear(x, self.weight, self.bias).tanh()


def test_what_is_declared_of_an_own_class():
    layer, x = Functional(8, 6), torch.randn(3, 8)
    assert not is_known(Functional)
    with pytest.raises(ValueError, match="Functional has a forward of its own"):
        convert(Net(layer), WEIGHT_ONLY)
    register_equivalent(Functional, lambda module, product, x: product(x).tanh())
    try:
        net = convert(Net(layer), WEIGHT_ONLY)
        torch.testing.assert_close(net(x), dequantize(copy.deepcopy(net))(x))
    finally:
        del EQUIVALENTS[f"{__name__}.Functional"]


class Same(nn.Linear):
    def forward(self, x):
        return F.linear(x, self.weight, self.bias)


def test_what_is_declared_to_be_just_the_product():
    register_equivalent("Same")
    try:
        net, x = convert(Net(Same(8, 6)), WEIGHT_ONLY), torch.randn(3, 8)
        torch.testing.assert_close(net(x), dequantize(copy.deepcopy(net))(x))
    finally:
        del EQUIVALENTS["Same"]


def test_groups_have_scales_of_their_rows():
    method = "act_maxabs_pow2_weights_pcs_maxabs_pow2"
    net = Net(DeepseekV4GroupedLinear(8, 12, 3))
    with torch.no_grad():
        net.layer.weight.mul_(torch.logspace(-3, 3, 12)[:, None])
    convert(net, FP8Config(target="cpu", activation_scheme="dynamic", scale_method=method))
    assert type(net.layer) is FP8GroupedLinear and net.layer.weight_scale.unique().numel() > 3
    x = torch.randn(2, 5, 3, 8)
    expected = torch.einsum("bthi,hoi->btho", x, net.layer.weight.clone().view(3, 4, 8))
    found = net(x)
    error, size = ((x.transpose(0, 2).flatten(1)).norm(dim=1) for x in (found - expected, expected))
    assert (error / size).max() < 0.05
    with pytest.raises(ValueError, match="bias"):
        convert(Net(DeepseekV4GroupedLinear(8, 12, 3, bias=True)), WEIGHT_ONLY)
