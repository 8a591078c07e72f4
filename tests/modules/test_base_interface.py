"""An FP8 module stands for the one it replaced: the code around it reads the same attributes and passes the same names.

It is no instance of the replaced class: code that computes with the weight of a Linear cannot take codes for values.
"""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
from torch import nn
from transformers import MobileNetV1Config, MobileNetV1Model, MobileNetV2Config, MobileNetV2Model
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.models.mimi.configuration_mimi import MimiConfig
from transformers.models.mimi.modeling_mimi import MimiConv1d
from transformers.pytorch_utils import Conv1D

from optimum_fp8 import FP8Config, convert, dequantize, prepare
from optimum_fp8.modules import FP8Module, fp8_modules


class OwnLinear(nn.Linear):
    """What users derive from a layer: settings, a child, a class attribute, properties and methods, no forward."""

    kind = "projection"

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.rank, self.tags, self.act = 4, ["a", "b"], nn.ReLU()

    @property
    def expansion(self) -> float:
        return self.out_features / self.in_features

    @property
    def rows(self) -> int:
        return self.weight.shape[0]

    def described(self, end: str = ".") -> str:
        return f"{self.kind} of rank {self.rank}{end}"


class OwnConv(nn.Conv2d):
    def __init__(self, *args, causal: bool = True, **kwargs):
        super().__init__(*args, **kwargs)
        self.causal = causal

    @property
    def receptive_field(self) -> list[int]:
        return [d * (k - 1) + 1 for d, k in zip(self.dilation, self.kernel_size, strict=True)]


def with_attributes():
    layer = nn.Linear(8, 6)
    layer.lora_rank, layer.note, layer.scale_by = 16, "set by a user", torch.ones(2)
    return layer


ORIGINALS = {
    "Linear": lambda: nn.Linear(8, 6),
    "Linear without bias": lambda: nn.Linear(8, 6, bias=False),
    "Conv1D": lambda: Conv1D(6, 8),
    "Conv2d": lambda: nn.Conv2d(4, 8, 3),
    "Conv2d, all": lambda: nn.Conv2d(4, 8, (3, 5), (2, 1), (1, 2), (1, 2), 2, padding_mode="reflect"),
    "Conv2d, same": lambda: nn.Conv2d(4, 8, 3, padding="same"),
    "Conv2d, valid": lambda: nn.Conv2d(4, 8, 3, padding="valid", bias=False),
    "FalconLinear": lambda: FalconLinear(8, 6),
    "subclass of Linear": lambda: OwnLinear(8, 6),
    "subclass of Conv2d": lambda: OwnConv(4, 8, 3, dilation=2, causal=False),
    "attributes of the instance": with_attributes,
}
WEIGHT = {"weight", "bias"}  # parameters, compared on their own


def pair(name: str):
    """A module, the FP8 module made from a copy of it, and an input."""
    torch.manual_seed(0)
    original = ORIGINALS[name]().eval()
    model = nn.Sequential(copy.deepcopy(original)).eval()
    x = torch.randn(2, 4, 9, 11) if isinstance(original, nn.Conv2d) else torch.randn(3, 8)
    prepare(model, FP8Config(target="cpu"))
    model(x)
    return original, convert(model)[0], x


def public(module: nn.Module) -> list[str]:
    """Names of what a module has besides that which every module has."""
    return [name for name in dir(module) if not name.startswith("_") and not hasattr(nn.Module, name)]


def same(found, expected) -> bool:
    if isinstance(expected, torch.Tensor):
        return torch.equal(found, expected)
    if isinstance(expected, nn.Module) or callable(expected):
        return type(found) is type(expected)
    return found == expected and type(found) is type(expected)


@pytest.mark.core
@pytest.mark.parametrize("name", ORIGINALS)
def test_every_public_attribute_is_there_and_equal(name):
    original, module, _ = pair(name)
    names = [each for each in public(original) if each not in WEIGHT]
    assert len(names) >= 2 and module.training is original.training
    missing = [each for each in names if not hasattr(module, each)]
    assert missing == []
    wrong = [each for each in names if not same(getattr(module, each), getattr(original, each))]
    assert wrong == []


@pytest.mark.parametrize("name", ORIGINALS)
def test_the_weight_has_its_shape_in_fp8_and_the_bias_is_as_it_was(name):
    original, module, _ = pair(name)
    assert (module.weight.shape, module.weight.dtype) == (original.weight.shape, original.weight.dtype)
    assert isinstance(module.weight, nn.Parameter) and torch.allclose(
        module.weight, original.weight, rtol=0.07, atol=0.01
    )
    shape = original.weight.shape[::-1] if isinstance(original, Conv1D) else original.weight.shape
    assert module.codes.shape == shape and module.codes.dtype is torch.float8_e4m3fn
    assert (module.bias is None) is (original.bias is None)
    assert original.bias is None or torch.equal(module.bias, original.bias)


@pytest.mark.core
@pytest.mark.parametrize("name", ORIGINALS)
def test_forward_takes_the_names_that_the_original_takes(name):
    original, module, x = pair(name)
    (argument,) = list(inspect.signature(original.forward).parameters)
    assert torch.equal(module(**{argument: x}), module(x))
    assert torch.allclose(module(**{argument: x}), original(**{argument: x}), atol=0.3)


@pytest.mark.parametrize("name", ORIGINALS)
def test_what_is_not_there_is_still_an_attribute_error(name):
    _, module, _ = pair(name)
    assert not hasattr(module, "no_such_attribute") and getattr(module, "no_such_attribute", 7) == 7
    with pytest.raises(AttributeError, match="no_such_attribute"):
        _ = module.no_such_attribute


def test_methods_and_properties_see_the_module():
    original, module, _ = pair("subclass of Linear")
    assert module.described() == original.described() and module.described(end="!") == "projection of rank 4!"
    assert module.expansion == original.expansion and module.rows == original.rows == 6
    assert module.tags == ["a", "b"] and isinstance(module.act, nn.ReLU)


@pytest.mark.parametrize(
    ("attribute", "value"), [("stride", (2, 2)), ("padding", (1, 1)), ("dilation", (2, 2)), ("note", "mine")]
)
def test_an_attribute_that_is_set_counts(attribute, value):
    original, module, x = pair("Conv2d")
    setattr(original, attribute, value)
    setattr(module, attribute, value)
    assert getattr(module, attribute) == value
    if attribute == "padding":  # which nn.Conv2d has in two forms
        original._reversed_padding_repeated_twice = [1, 1, 1, 1]
    assert module(x).shape == original(x).shape
    assert torch.allclose(module(x), original(x), atol=0.3)


@pytest.mark.parametrize("name", ["Conv1D", "Conv2d, all", "subclass of Linear", "attributes of the instance"])
def test_copies_and_dequantized_modules_have_them_too(name):
    original, module, x = pair(name)
    names = [each for each in public(original) if each not in WEIGHT]
    clone, plain = copy.deepcopy(module), dequantize(nn.Sequential(copy.deepcopy(module)))[0]
    assert type(plain) is type(original)
    for each in (clone, plain):
        assert [key for key in names if not same(getattr(each, key), getattr(original, key))] == []
    assert torch.equal(clone(x), module(x))


@pytest.mark.parametrize("name", ORIGINALS)
def test_it_is_an_instance_of_the_class_of_the_library_and_its_origin_of_the_subclass(name):
    original, module, _ = pair(name)
    library = next(cls for cls in type(original).__mro__ if cls.__module__.startswith(("torch.", "transformers.pyt")))
    assert isinstance(module, FP8Module) and isinstance(module, library) and type(module) is not type(original)
    assert type(module.origin) is type(original)


# --- models whose code asks its layers ----------------------------------------------------------------------------


class Causal(nn.Module):
    """A convolution that sees only what is above and left of it, padded by what it asks of its layer."""

    def __init__(self, **options):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, **options)

    def forward(self, x):
        (kh, kw), (dh, dw), (sh, sw) = self.conv.kernel_size, self.conv.dilation, self.conv.stride
        x = nn.functional.pad(x, ((kw - 1) * dw - sw + 1, 0, (kh - 1) * dh - sh + 1, 0))
        out = self.conv(input=x)
        assert out.shape[-3] == self.conv.out_channels
        return out


def mobilenet_v1():
    return MobileNetV1Model(MobileNetV1Config(image_size=32, depth_multiplier=0.25)), torch.randn(2, 3, 32, 32)


def mobilenet_v2():
    config = MobileNetV2Config(image_size=32, depth_multiplier=0.25, depth_divisible_by=8, min_depth=8)
    return MobileNetV2Model(config), torch.randn(2, 3, 32, 32)


def causal():
    layers = [Causal(kernel_size=3, stride=2), nn.ReLU(), nn.Conv2d(8, 3, 1), Causal(kernel_size=(2, 3), dilation=2)]
    return nn.Sequential(*layers), torch.randn(2, 3, 16, 16)


def as_if_trained(model):
    """Weights of a size that keeps the signal up through many layers, which transformers' own would not."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
    return model.eval()


def first(output):
    return output[0] if not isinstance(output, torch.Tensor) else output


@pytest.mark.core
@pytest.mark.parametrize("make", [mobilenet_v1, mobilenet_v2, causal])
@pytest.mark.parametrize("scheme", ["static", "dynamic"])
@torch.no_grad()
def test_models_that_ask_their_convolutions_are_calibrated_and_run(make, scheme):
    torch.manual_seed(0)
    model, x = make()
    expected = first(as_if_trained(model)(x))
    if scheme == "static":
        prepare(model, FP8Config(target="cpu", activation_scheme="static"))
        model(x)
        convert(model)
    else:
        convert(model, FP8Config(target="cpu", activation_scheme="dynamic"))
    assert fp8_modules(model)
    found = first(model(x))
    assert found.shape == expected.shape and torch.isfinite(found).all()
    assert torch.nn.functional.cosine_similarity(found.flatten(), expected.flatten(), dim=0) > 0.9


@torch.no_grad()
def test_a_causal_convolution_of_transformers_in_one_dimension():
    """MimiConv1d asks its layer for its geometry at run time too."""
    torch.manual_seed(0)
    model = nn.Sequential(MimiConv1d(MimiConfig(), 4, 8, kernel_size=5, stride=2, dilation=1)).eval()
    x, length = torch.randn(2, 4, 32), torch.tensor([32, 20])
    expected, lengths = model(x), model[0]._get_output_length(length)
    prepare(model, FP8Config(target="cpu"))
    model(x)
    convert(model)
    assert list(fp8_modules(model)) == ["0.conv"]
    assert model(x).shape == expected.shape and torch.allclose(model(x), expected, atol=0.3)
    assert torch.equal(model[0]._get_output_length(length), lengths)
