"""FP8 convolutions as modules: every geometry of nn.ConvNd, against torch's own convolution of the same values."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from optimum_fp8 import FP8Config, convert, dequantize, prepare
from optimum_fp8.modules import FP8Conv, FP8Conv2d, LayerHandler, fp8_modules, register_handler
from optimum_fp8.modules import handler as registry
from optimum_fp8.modules.handler import Surroundings
from optimum_fp8.selection import scheme_for

KINDS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
GEOMETRIES = {
    "plain": {},
    "stride": {"stride": 2},
    "padding": {"padding": 2},
    "dilation": {"dilation": 2},
    "groups": {"groups": 2},
    "depthwise": {"groups": 4, "padding": 1},
    "valid": {"padding": "valid"},
    "same": {"padding": "same"},
    "same, even": {"padding": "same", "kernel_size": 4, "dilation": 3},
    "reflect": {"padding": 1, "padding_mode": "reflect"},
    "circular": {"padding": 2, "padding_mode": "circular"},
    "replicate, same": {"padding": "same", "padding_mode": "replicate"},
    "all": {"stride": 2, "padding": 1, "dilation": 2, "groups": 2, "padding_mode": "replicate", "bias": False},
}


@pytest.fixture(autouse=True)
def every_dimension(monkeypatch):
    """Conv1d and Conv3d as kinds, for the test at hand."""
    monkeypatch.setattr(registry, "_handlers", list(registry._handlers))
    for cls in (nn.Conv1d, nn.Conv3d):
        register_handler(LayerHandler(cls.__name__.lower(), (cls,), FP8Conv))


def made(cls, geometry, dtype=torch.float32, **options):
    torch.manual_seed(0)
    module = cls(4, 8, **{"kernel_size": 3, **GEOMETRIES[geometry]}).to(dtype)
    size = {1: (11,), 2: (9, 11), 3: (9, 10, 11)}[KINDS.index(cls) + 1]
    x = torch.randn(2, 4, *size, dtype=dtype)
    model = nn.Sequential(module)
    prepare(model, FP8Config(**{"target": "cpu", **options}))
    model(x)
    return module, convert(model)[0], x


def rounded(x, scale):
    """`x` on the grid of E4M3 with a scale."""
    return (x * (1 / scale)).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale


@pytest.mark.core
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("cls", KINDS)
def test_it_is_the_convolution_of_rounded_values(cls, geometry):
    plain, module, x = made(cls, geometry)
    assert type(module) is (FP8Conv2d if cls is nn.Conv2d else FP8Conv)
    with torch.no_grad():
        plain.weight.copy_(module.codes.float() * module.weight_scale)
        expected = plain(rounded(x, module.input_scale))
        torch.testing.assert_close(module(x), expected, rtol=1e-4, atol=1e-5)
        unbatched = plain(rounded(x[0], module.input_scale))
        torch.testing.assert_close(module(x[0]), unbatched, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scheme", ["dynamic", "weight_only"])
@pytest.mark.parametrize("method", ["maxabs_pow2", "maxabs_hw"])
@pytest.mark.parametrize("cls", KINDS)
def test_dynamic_and_weight_only(cls, scheme, method):
    plain, module, x = made(cls, "padding", activation_scheme=scheme, scale_method=method)
    with torch.no_grad():
        plain.weight.copy_(module.codes.float() * module.weight_scale)
        seen = x
        if scheme == "dynamic":
            seen = rounded(x, torch.exp2(torch.ceil(torch.log2(x.abs().max() / 224))))
        torch.testing.assert_close(module(x), plain(seen), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cls", KINDS)
def test_a_scale_for_each_output_channel(cls):
    plain, module, x = made(cls, "groups", scale_method="act_maxabs_pow2_weights_pcs_maxabs_pow2")
    assert module.weight_scale.shape == (8, *[1] * (plain.weight.ndim - 1))
    with torch.no_grad():
        plain.weight.copy_(module.codes.float() * module.weight_scale)
        torch.testing.assert_close(module(x), plain(rounded(x, module.input_scale)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cls", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_its_output_has_the_dtype_and_layout_of_the_original(cls, dtype):
    plain, module, x = made(cls, "padding", dtype)
    assert module(x).dtype == dtype and module(x).shape == plain(x).shape
    assert ((module(x) - plain(x)).norm() / plain(x).norm()).item() < 0.1


def test_a_method_whose_inputs_are_per_token_is_per_tensor_here():
    """The last dimension of an image is no row of features."""
    _, module, x = made(nn.Conv2d, "plain", scale_method="maxabs_pcs_pow2")
    assert module.activation_scale(x).shape == (1,)


@pytest.mark.parametrize("cls", KINDS)
def test_errors_name_the_module_and_the_shape_that_fits(cls):
    _, module, x = made(cls, "plain")
    sizes = ("D", "H", "W")[-(x.ndim - 2) :]
    with pytest.raises(RuntimeError, match=rf"^0: an {type(module).__name__} of 4 .* \(N, 4, {', '.join(sizes)}\)"):
        module(x[:, :3])


@pytest.mark.parametrize("cls", KINDS)
def test_dequantized_it_has_its_geometry_again(cls):
    plain, module, x = made(cls, "all")
    model = dequantize(nn.Sequential(module))
    assert type(model[0]) is cls and not fp8_modules(model)
    with torch.no_grad():
        plain.weight.copy_(model[0].weight)
        assert torch.equal(model[0](x), plain(x))


def test_its_text_says_what_it_is():
    _, module, _ = made(nn.Conv3d, "plain")
    assert repr(module) == "FP8Conv(4, 8, (3, 3, 3), E4M3 on cpu, weight per tensor, activations static)"


@pytest.mark.parametrize("kind", [nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d])
def test_transposed_convolutions_are_refused(kind):
    module = kind(2, 2, 3)
    handler = LayerHandler("transposed", (kind,), FP8Conv)
    why = handler.refusal(module, scheme_for(FP8Config()), Surroundings(nn.Sequential(module)))
    assert str(why) == "transposed convolutions are not covered"
