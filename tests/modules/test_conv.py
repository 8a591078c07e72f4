"""FP8 convolutions as modules: every geometry of nn.ConvNd, against torch's own convolution of the same values."""

from __future__ import annotations

import copy

import pytest
import torch
from grids import over
from torch import nn

from optimum_fp8 import FP8Config, convert, dequantize, prepare
from optimum_fp8.modules import FP8Conv, LayerHandler, fp8_modules
from optimum_fp8.modules.conv import FP8ConvTranspose
from optimum_fp8.modules.handler import Surroundings
from optimum_fp8.selection import scheme_for

KINDS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = [nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d]
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
    assert isinstance(module, FP8Conv) and isinstance(module, cls) and type(module).__name__ == f"FP8{cls.__name__}"
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
    assert repr(module) == "FP8Conv3d(4, 8, (3, 3, 3), E4M3 on cpu, weight per tensor, activations static)"


@pytest.mark.parametrize("kind", TRANSPOSED)
def test_another_counterpart_refuses_transposed_convolutions(kind):
    module = kind(2, 2, 3)
    handler = LayerHandler("transposed", (kind,), FP8Conv)
    why = handler.refusal(module, scheme_for(FP8Config()), Surroundings(nn.Sequential(module)))
    assert str(why) == "FP8Conv is for convolutions that are not transposed"


# --- transposed ---------------------------------------------------------------------------------------------------

SPREAD = {
    "plain": {},
    "stride": {"stride": 3},
    "output padding": {"stride": 3, "padding": 2, "output_padding": 2},
    "groups": {"groups": 2, "dilation": 2, "output_padding": 1},
    "depthwise": {"groups": 4, "bias": False, "stride": 2, "padding": 1},
}


def spread(cls, geometry, dtype=torch.float32, **options):
    torch.manual_seed(0)
    module = cls(4, 8, **{"kernel_size": 3, **SPREAD[geometry]}).to(dtype)
    x = torch.randn(2, 4, *(5, 3, 4)[: module.weight.ndim - 2], dtype=dtype)
    model = nn.Sequential(module)
    prepare(model, FP8Config(**{"target": "cpu", **options}))
    model(x)
    return module, convert(model)[0], x


@pytest.mark.core
@over(cls=TRANSPOSED, geometry=SPREAD, method=["maxabs_pow2", "act_maxabs_pow2_weights_pcs_maxabs_pow2"])
def test_it_is_the_transposed_convolution_of_rounded_values(cls, geometry, method):
    plain, module, x = spread(cls, geometry, scale_method=method)
    dims, groups = plain.weight.ndim - 2, plain.groups
    assert type(module) is FP8ConvTranspose and module.codes.shape == (8, 4 // groups, *[3] * dims)
    ranges = torch.cat([part.abs().amax(dim=(0, *range(2, dims + 2))) for part in plain.weight.chunk(groups)])
    if "pcs" in method:
        assert module.weight_scale.shape == (8, *[1] * (dims + 1))
        assert torch.equal(module.weight_scale.flatten(), torch.exp2(torch.ceil(torch.log2(ranges / 224))))
    with torch.no_grad():
        assert module.weight.shape == plain.weight.shape
        torch.testing.assert_close(module.weight.clone(), plain.weight, rtol=0.07, atol=1e-3)
        plain.weight.copy_(module.weight)
        seen = rounded(x, module.input_scale)
        torch.testing.assert_close(module(x), plain(seen), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(module(x[0]), plain(seen[0]), rtol=1e-4, atol=1e-5)


@over(cls=TRANSPOSED, scheme=["dynamic", "weight_only"])
def test_a_transposed_convolution_takes_the_size_of_its_output(cls, scheme):
    plain, module, x = spread(cls, "stride", activation_scheme=scheme)
    size = [dim + 1 for dim in plain(x).shape[2:]]
    with torch.no_grad():
        assert module(x, output_size=size).shape == plain(x, output_size=size).shape
        plain.weight.copy_(module.weight)
        if scheme == "weight_only":
            torch.testing.assert_close(module(x, size), plain(x, output_size=size), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="output size"):
        module(x, output_size=[99] * (x.ndim - 2))


@over(cls=TRANSPOSED, geometry=["output padding", "groups"], dtype=[torch.bfloat16, torch.float32])
def test_transposed_saved_loaded_and_dequantized(cls, geometry, dtype):
    method = "act_maxabs_pow2_weights_pcs_maxabs_pow2"
    plain, module, x = spread(cls, geometry, dtype, scale_method=method)
    config = FP8Config(target="cpu", activation_scheme="dynamic", scale_method=method)
    again = convert(nn.Sequential(copy.deepcopy(plain)), config)
    again.load_state_dict({f"0.{key}": value for key, value in module.state_dict().items() if "input" not in key})
    assert torch.equal(again[0].codes.view(torch.uint8), module.codes.view(torch.uint8))
    values = module.weight.clone()
    restored = dequantize(nn.Sequential(module))[0]
    assert type(restored) is cls and torch.equal(restored.weight, values) and restored.weight.is_contiguous()
    with torch.no_grad():
        plain.weight.copy_(values)
        assert torch.equal(restored(x), plain(x))


# --- channels that lie side by side -------------------------------------------------------------------------------


@over(
    cls=[nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.ConvTranspose3d],
    scheme=["static", "weight_only"],
    of=["both", "weight", "input"],
)
def test_its_output_lies_in_memory_as_that_of_the_original(cls, scheme, of):
    dtype = torch.bfloat16
    form = torch.channels_last if cls in (nn.Conv2d, nn.ConvTranspose2d) else torch.channels_last_3d
    model = nn.Sequential(cls(4, 8, 3)).to(dtype)
    x = torch.randn(2, 4, *(5, 4, 6)[: model[0].weight.ndim - 2]).to(dtype)
    model = model.to(memory_format=form) if of != "input" else model
    x = x.to(memory_format=form) if of != "weight" else x
    with torch.no_grad():
        expected = model(x)
        prepare(model, FP8Config(target="cpu", activation_scheme=scheme))
        model(x)
        convert(model)
        assert model(x).stride() == expected.stride()
        again = convert(nn.Sequential(cls(4, 8, 3)).to(dtype), FP8Config(target="cpu", activation_scheme="dynamic"))
        again = again.to(memory_format=form) if of != "input" else again
        assert again(x).stride() == expected.stride()


def test_valid_padding_of_another_mode_leaves_the_layout_that_torch_leaves():
    conv = nn.Conv2d(4, 8, 3, padding="valid", padding_mode="circular")
    x = torch.randn(2, 4, 12, 10).to(memory_format=torch.channels_last)
    expected = conv(x)
    found = convert(nn.Sequential(conv), FP8Config(target="cpu", activation_scheme="weight_only"))(x)
    assert found.stride() == expected.stride() and found.shape == expected.shape
