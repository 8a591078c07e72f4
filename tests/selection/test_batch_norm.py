"""Which batch norms can be folded: those of the convolution's output alone, as the source of classes tells."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from transformers import (
    MobileNetV1Config,
    MobileNetV1Model,
    MobileViTConfig,
    MobileViTModel,
    RegNetConfig,
    RegNetModel,
    ResNetConfig,
    ResNetModel,
)

from optimum_fp8.selection import batch_norm_pairs


class Block(nn.Module):
    def __init__(self, conv=None, norm=None):
        super().__init__()
        self.conv = conv or nn.Conv2d(3, 4, 3)
        self.norm = norm or nn.BatchNorm2d(4)
        self.act = nn.ReLU()


class InTurn(Block):
    def forward(self, x):
        h = self.conv(x)
        h = self.norm(h)
        return self.act(h)


class Nested(Block):
    def forward(self, x):
        return self.act(self.norm(self.conv(x)))


class Returned(Block):
    def forward(self, x):
        x = self.conv(x)
        return self.act(self.norm(x))


class InAMethod(Block):
    def forward(self, x):
        return self._convolved(x)

    def _convolved(self, x):
        x = self.conv(x)
        x = self.act(self.norm(x))
        return x


class WhereItIs(Block):
    def forward(self, x):
        x = self.conv(x)
        if self.norm is not None:
            x = self.norm(x)
        return self.act(x)


def padded(x, layer):
    return nn.functional.pad(x, (0, layer.stride[0], 0, layer.kernel_size[0]))


def weighed(x, layer):
    return x * layer.weight.mean()


class Geometry(Block):
    def forward(self, x):
        x = padded(x, self.conv)
        x = self.conv(x)
        x = self.norm(x)
        return x[..., :: self.conv.stride[0]]


class PassedOn(Block):
    def forward(self, x):
        x = weighed(x, self.conv)
        x = self.conv(x)
        x = self.norm(x)
        return x


class UsedTwice(Block):
    def forward(self, x):
        h = self.conv(x)
        y = self.norm(h)
        return self.act(y) + h


class UsedInTheSame(Block):
    def forward(self, x):
        h = self.conv(x)
        h = self.norm(h) + h
        return h


class NotInTurn(Block):
    def forward(self, x):
        h = self.conv(x)
        h = self.act(h)
        h = self.norm(h)
        return h


class Sometimes(Block):
    def forward(self, x):
        h = self.conv(x)
        if x.mean() > 0:
            h = self.norm(h)
        return h


class ConvTwice(Block):
    def forward(self, x):
        h = self.conv(x)
        h = self.norm(h)
        return h, self.conv(x)


class NormTwice(Block):
    def forward(self, x):
        h = self.conv(x)
        h = self.norm(h)
        return self.norm(h)


class ReadsWeight(Block):
    def forward(self, x):
        h = self.conv(x)
        h = self.norm(h)
        return h * self.conv.weight.mean()


class ByAnyName(Block):
    def forward(self, x):
        h = self.conv(x)
        h = self.norm(h)
        return h + sum(child(x).sum() for child in self.children())


class Outside(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = InTurn()

    def forward(self, x):
        return self.block(x) + self.block.conv(x)


class Held(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))

    def forward(self, x):
        return self.layers(x)


class WalkedThrough(Held):
    def forward(self, x):
        outputs = []
        for layer in self.layers:
            x = layer(x)
            outputs.append(x)
        return outputs


@pytest.mark.parametrize("cls", [InTurn, Nested, Returned, InAMethod, WhereItIs, Geometry])
def test_the_norm_alone_takes_what_the_convolution_returns(cls):
    assert batch_norm_pairs(nn.ModuleList([cls()])) == [("0.conv", "0.norm")]


@pytest.mark.parametrize(
    "cls",
    [UsedTwice, UsedInTheSame, NotInTurn, Sometimes, ConvTwice, NormTwice, ReadsWeight, PassedOn, ByAnyName, Outside],
)
def test_what_else_uses_either_leaves_both_alone(cls):
    assert batch_norm_pairs(cls()) == []


def test_children_of_a_sequential_that_is_only_called():
    layers = [nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4), nn.ReLU(), nn.ConvTranspose1d(4, 5, 3), nn.BatchNorm1d(5)]
    assert batch_norm_pairs(nn.Sequential(nn.Sequential(*layers))) == [("0.0", "0.1"), ("0.3", "0.4")]
    assert batch_norm_pairs(Held()) == [("layers.0", "layers.1")]
    assert batch_norm_pairs(WalkedThrough()) == []
    assert batch_norm_pairs(nn.ModuleList([nn.Sequential(*layers)])) == [], "who calls it is not known"


def sequential(conv, norm):
    return nn.Sequential(conv, norm)


def shared_weight():
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1))
    model[3].weight = model[0].weight
    return model


def shared_conv():
    conv = nn.Conv2d(4, 4, 1)
    return nn.Sequential(conv, nn.BatchNorm2d(4), nn.ReLU(), conv)


def in_a_list():
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
    model.also = [model[0]]
    return model


def hooked(part):
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
    model[part].register_forward_hook(lambda *_: None)
    return model


def replaced():
    model = InTurn()
    model.forward = lambda x: model.conv(x)
    return model


UNFIT = {
    "channels": lambda: sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(5)),
    "dimensions": lambda: sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm1d(4)),
    "no statistics": lambda: sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False)),
    "other norm": lambda: sequential(nn.Conv2d(3, 4, 3), nn.InstanceNorm2d(4)),
    "groups of a transposed one": lambda: sequential(nn.ConvTranspose2d(4, 4, 3, groups=2), nn.BatchNorm2d(4)),
    "parametrized": lambda: sequential(parametrizations.weight_norm(nn.Conv2d(3, 4, 3)), nn.BatchNorm2d(4)),
    "codes": lambda: sequential(nn.Conv2d(3, 4, 3).to(torch.float8_e4m3fn), nn.BatchNorm2d(4)),
    "shared weight": shared_weight,
    "shared convolution": shared_conv,
    "kept in a list": in_a_list,
    "hook on the convolution": lambda: hooked(0),
    "hook on the norm": lambda: hooked(1),
    "another forward": replaced,
}


@pytest.mark.parametrize("why", UNFIT)
def test_what_does_not_fit_is_left_alone(why):
    assert batch_norm_pairs(UNFIT[why]()) == []


MODELS = {
    "ResNet": (ResNetModel, ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1]), 8),
    "RegNet": (RegNetModel, RegNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], groups_width=8), 9),
    "MobileNetV1": (MobileNetV1Model, MobileNetV1Config(depth_multiplier=0.25), 27),
    "MobileViT": (MobileViTModel, MobileViTConfig(), 32),
}


@pytest.mark.parametrize("name", MODELS)
def test_all_of_a_model(name):
    cls, config, count = MODELS[name]
    with torch.device("meta"):
        model = cls(config)
    norms = [each for each, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)]
    assert [pair.norm for pair in batch_norm_pairs(model)] == norms and len(norms) == count
