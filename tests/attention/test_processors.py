"""Attention that processors of diffusers compute: found by what they call, and in FP8 with scales of its own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from diffusers import attention_backend
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0, IPAdapterAttnProcessor2_0
from diffusion_models import output, tiny
from fake_quantization import FakeAttention
from torch import nn

from optimum_fp8 import FP8Config, convert, prepare, quantization_report
from optimum_fp8.attention import scales_of
from optimum_fp8.attention.detect import Kind, attention_kind, attention_modules

LAYERS = {"names": [], "types": ["Linear", "Conv2d"]}
# How many modules of each tiny model compute attention.
COUNTS = {
    "ddim": 4,
    "stable diffusion": 8,
    "stable diffusion xl": 16,
    "stable diffusion 3": 2,
    "flux": 2,
    "dit": 2,
    "wan": 4,
    "autoencoder": 2,
}


class Mixer:
    """Computes attention for the module that it is given."""

    def __call__(self, owner, x):
        return F.scaled_dot_product_attention(*(x[:, None] for _ in range(3)))[:, 0]


class Plain:
    """Computes no attention."""

    def __call__(self, owner, x):
        return owner.layer(x)


class OwnAttention(nn.Module):
    """Hands itself to something."""

    def __init__(self, processor):
        super().__init__()
        self.layer, self.processor = nn.Linear(8, 8), processor

    def forward(self, x):
        return self.processor(self, x)


def test_a_processor_tells_whether_its_module_computes_attention():
    assert attention_kind(OwnAttention(Mixer())) is Kind.FUNCTIONS
    assert attention_kind(OwnAttention(Plain())) is None


@pytest.mark.parametrize("name", COUNTS)
def test_attention_of_diffusers_is_found(name):
    found = attention_modules(tiny(name))
    assert len(found) == COUNTS[name] and set(found.values()) == {Kind.FUNCTIONS}


def attention_in_fp8(model, name, **options):
    config = FP8Config(target="cpu", attention=True, scale_method="maxabs_arbitrary", blocklist=LAYERS, **options)
    prepare(model, config)
    output(model, name)
    return convert(model)


@pytest.mark.parametrize(("name", "activations"), [("flux", "static"), ("flux", "dynamic"), ("wan", "static")])
def test_attention_is_as_exact_as_one_that_is_rounded_by_hand(name, activations):
    exact = output(tiny(name), name)
    with FakeAttention():
        rounded = output(tiny(name), name)
    model = attention_in_fp8(tiny(name), name, activation_scheme=activations)
    found = output(model, name)
    assert 0 < (found - exact).norm() <= 1.5 * (rounded - exact).norm()
    report = quantization_report(model)
    assert len(report.attention) == COUNTS[name] and all(row.quantized for row in report.attention)
    assert not report.fallbacks


@pytest.mark.parametrize("processor", [AttnProcessor, AttnProcessor2_0])
def test_scales_are_those_of_what_the_products_take(processor):
    torch.manual_seed(0)
    model = nn.ModuleDict({"attn": Attention(16, heads=2, dim_head=8, processor=processor())}).eval()
    x = torch.randn(2, 5, 16)
    model.forward = lambda x: model["attn"](x)
    config = FP8Config(
        target="cpu", attention=True, scale_method="maxabs_arbitrary", input_backoff=1.0, blocklist=LAYERS
    )
    prepare(model, config)
    with torch.no_grad():
        exact = model(x)
        layers = {name: model["attn"].get_submodule(f"to_{name}")(x).abs().max() for name in "qkv"}
        convert(model)
        found = model(x)
    scales = scales_of(model["attn"])
    assert {"q_scale", "k_scale", "v_scale", "p_scale"} <= scales.keys()
    if processor is AttnProcessor2_0:
        for name, largest in layers.items():
            torch.testing.assert_close(scales[f"{name}_scale"], (largest / 448)[None], rtol=0.01, atol=0)
    assert 0 < (found - exact).norm() < 0.1 * exact.norm()


def test_a_processor_that_is_a_module_computes_in_fp8():
    torch.manual_seed(0)
    adapted = IPAdapterAttnProcessor2_0(16, cross_attention_dim=16, num_tokens=(4,))
    attention = Attention(16, cross_attention_dim=16, heads=2, dim_head=8, processor=adapted)
    model = nn.ModuleDict({"attn": attention}).eval()
    model.forward = lambda x, text, image: model["attn"](x, (text, [image]))
    given = torch.randn(2, 5, 16), torch.randn(2, 7, 16), torch.randn(2, 1, 4, 16)
    prepare(model, FP8Config(target="cpu", attention=True, blocklist=LAYERS))
    with torch.no_grad():
        exact = model(*given)
        convert(model)
        found = model(*given)
    assert list(attention_modules(model)) == ["attn"]
    assert 0 < (found - exact).norm() < 0.1 * exact.norm()


def test_another_backend_of_diffusers_is_rounded_as_well():
    model = attention_in_fp8(tiny("flux"), "flux")
    with attention_backend("_native_math"):
        other = output(model, "flux")
    assert torch.equal(other, output(model, "flux"))
