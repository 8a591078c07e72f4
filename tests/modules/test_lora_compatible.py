"""diffusers' layers for LoRA: quantized like their bases, refused with a LoRA."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from optimum_fp8 import FP8Config, convert, dequantize, load, prepare, quantization_report, save
from optimum_fp8.errors import FP8StateError


class LoRACompatibleLinear(nn.Linear):
    def __init__(self, *args, lora_layer=None, **kwargs):
        super().__init__(*args, **kwargs)
        self.lora_layer = lora_layer

    def set_lora_layer(self, lora_layer):
        self.lora_layer = lora_layer

    def forward(self, hidden_states, scale=1.0):
        if self.lora_layer is None:
            return super().forward(hidden_states)
        return super().forward(hidden_states) + scale * self.lora_layer(hidden_states)


class LoRACompatibleConv(nn.Conv2d):
    def __init__(self, *args, lora_layer=None, **kwargs):
        super().__init__(*args, **kwargs)
        self.lora_layer = lora_layer

    def forward(self, hidden_states, scale=1.0):
        geometry = self.stride, self.padding, self.dilation, self.groups
        output = F.conv2d(hidden_states, self.weight, self.bias, *geometry)
        return output if self.lora_layer is None else output + scale * self.lora_layer(hidden_states)


LINEAR, CONV = ("linear", torch.randn(3, 8)), ("conv", torch.randn(2, 8, 6, 6))


def layer_of(kind, **options):
    if kind == "linear":
        return LoRACompatibleLinear(8, 4, **options)
    return LoRACompatibleConv(8, 4, 3, padding=1, **options)


@torch.no_grad()
@pytest.mark.parametrize("kind, x", [LINEAR, CONV], ids=["linear", "conv"])
def test_they_are_what_their_bases_are(kind, x, tmp_path):
    model = nn.Sequential(layer_of(kind))
    base = nn.Linear(8, 4) if kind == "linear" else nn.Conv2d(8, 4, 3, padding=1)
    base.load_state_dict(model[0].state_dict())
    outputs = []
    for each in (model, nn.Sequential(base)):
        prepare(each, FP8Config(target="cpu"))
        each(x)
        outputs.append(convert(each)(x))
    assert torch.equal(*outputs) and torch.equal(model[0](x, scale=0.5), outputs[0])
    assert quantization_report(model).modules[0].type == type(layer_of(kind)).__name__
    save(model, tmp_path / "saved")
    assert torch.equal(load(tmp_path / "saved", nn.Sequential(layer_of(kind)))(x), outputs[0])
    dequantize(model)
    assert type(model[0]) is type(layer_of(kind)) and model[0].lora_layer is None


@pytest.mark.parametrize("kind, x", [LINEAR, CONV], ids=["linear", "conv"])
def test_with_a_lora_they_stay_in_high_precision(kind, x):
    lora = nn.Identity() if kind == "linear" else nn.Conv2d(8, 4, 3, padding=1)
    model = nn.Sequential(layer_of(kind, lora_layer=lora), nn.Linear(8, 4))
    convert(model, FP8Config(target="cpu", activation_scheme="weight_only"))
    rows = {row.name: row for row in quantization_report(model).modules}
    assert "it has a lora_layer: merge it" in rows["0"].reason and rows["1"].quantized
    assert all(row.reason == "it belongs to an adapter" for name, row in rows.items() if "lora_layer" in name)


def test_a_lora_that_comes_later_is_refused():
    model = convert(nn.Sequential(layer_of("linear")), FP8Config(target="cpu", activation_scheme="weight_only"))
    model[0].set_lora_layer(nn.Linear(8, 4))
    with pytest.raises(FP8StateError, match="0: an FP8 module was given a lora_layer"):
        model(torch.randn(2, 8))


def test_a_padding_mode_that_they_ignore():
    layer = LoRACompatibleConv(8, 4, 3, padding=1, padding_mode="reflect")
    model = convert(nn.Sequential(layer, nn.Conv2d(4, 4, 1)), FP8Config(target="cpu", activation_scheme="weight_only"))
    assert model[0] is layer and "pads with zeros whatever" in quantization_report(model).modules[0].reason


def test_a_class_of_the_name_without_a_lora_is_its_base():
    class LoRACompatibleLinear(nn.Linear):
        pass

    model = convert(nn.Sequential(LoRACompatibleLinear(8, 4)), FP8Config(target="cpu", activation_scheme="weight_only"))
    assert quantization_report(model).modules[0].quantized
