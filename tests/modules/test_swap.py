"""Swapping modules in a tree: every place, every hook, the training flag, accelerate's hooks."""

from __future__ import annotations

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from torch import nn

from optimum_fp8 import FP8Config, convert, dequantize
from optimum_fp8.modules import FP8Linear, swap


class Tree(nn.Module):
    """One layer in three places: an attribute, an item of a list, and inside another module."""

    def __init__(self):
        super().__init__()
        self.own = nn.Linear(4, 4)
        self.several = nn.ModuleList([self.own, nn.Linear(4, 4)])
        self.inner = nn.Sequential(nn.ReLU(), self.own)

    def forward(self, x):
        return self.inner(self.several[1](self.own(x)))


def test_every_place_gets_the_replacement_and_others_are_left_alone():
    tree, new = Tree(), nn.Linear(4, 4)
    other = tree.several[1]
    swap(tree, {tree.own: new})
    assert tree.own is tree.several[0] is tree.inner[1] is new and tree.several[1] is other


def test_names_keep_their_order():
    tree = Tree()
    before = [name for name, _ in tree.named_modules(remove_duplicate=False)]
    swap(tree, {tree.own: nn.Linear(4, 4)})
    assert [name for name, _ in tree.named_modules(remove_duplicate=False)] == before


def test_a_replacement_of_a_replacement():
    tree = Tree()
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    swap(tree, {tree.own: first, first: second})
    assert tree.own is first, "one step at a time"
    swap(tree, {first: second})
    assert tree.own is second


@pytest.mark.parametrize("training", [True, False])
def test_the_training_flag_goes_along(training):
    tree, new = Tree(), nn.Sequential(nn.Dropout())
    tree.own.train(training)
    swap(tree, {tree.own: new})
    assert new.training is new[0].training is training


@pytest.mark.core
def test_hooks_go_along_with_their_options_and_can_still_be_removed():
    tree, calls = Tree(), []
    register = [
        lambda module: module.register_forward_pre_hook(lambda *args: calls.append("pre")),
        lambda module: module.register_forward_pre_hook(lambda *args: calls.append("pre, kwargs"), with_kwargs=True),
        lambda module: module.register_forward_hook(lambda *args: calls.append("after")),
        lambda module: module.register_forward_hook(lambda *args: calls.append("after, kwargs"), with_kwargs=True),
        lambda module: module.register_forward_hook(lambda *args: calls.append("always"), always_call=True),
    ]
    handles = [each(tree.own) for each in register]
    convert(tree, FP8Config(activation_scheme="dynamic"))
    assert type(tree.own) is FP8Linear and tree.own is tree.inner[1]
    tree.own(torch.ones(1, 4))
    assert calls == ["pre", "pre, kwargs", "after", "after, kwargs", "always"]
    calls.clear()
    with pytest.raises(RuntimeError):
        tree.own(torch.ones(1, 5))
    assert calls == ["pre", "pre, kwargs", "always"]
    calls.clear()
    dequantize(tree)
    assert type(tree.own) is nn.Linear
    tree.own(torch.ones(1, 4))
    assert len(calls) == 5
    for handle in handles:
        handle.remove()
    tree.own(torch.ones(1, 4))
    assert len(calls) == 5


def test_a_hook_that_changes_the_output_still_does():
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].register_forward_hook(lambda module, args, output: output * 0 + 7)
    convert(model, FP8Config(activation_scheme="dynamic"))
    assert (model(torch.ones(2, 4)) == 7).all()


class Counting(ModelHook):
    def __init__(self):
        self.calls = 0

    def pre_forward(self, module, *args, **kwargs):
        self.calls += 1
        return args, kwargs


@pytest.mark.core
def test_accelerates_hooks_go_along():
    model, hook = nn.Sequential(nn.Linear(4, 4)), Counting()
    add_hook_to_module(model[0], hook)
    model(torch.ones(1, 4))
    convert(model, FP8Config(activation_scheme="dynamic"))
    assert type(model[0]) is FP8Linear and model[0]._hf_hook is hook
    model(torch.ones(1, 4))
    assert hook.calls == 2
    dequantize(model)
    model(torch.ones(1, 4))
    assert hook.calls == 3


class Listed(nn.Module):
    """Calls its layers from a plain list, as MaskFormer does, from a tuple and from a dictionary."""

    def __init__(self):
        super().__init__()
        self.layers = [nn.Linear(4, 4), nn.ReLU()]
        self.pair, self.named = (nn.Linear(4, 4),), {"last": nn.Linear(4, 4)}
        for number, layer in enumerate((*self.layers, *self.pair, *self.named.values())):
            self.add_module(str(number), layer)

    def forward(self, x):
        for layer in (*self.layers, *self.pair, *self.named.values()):
            x = layer(x)
        return x


def test_modules_that_are_called_from_plain_containers_are_replaced_there():
    model, x = Listed(), torch.randn(3, 4)
    expected, before = model(x), model.layers
    convert(model, FP8Config(activation_scheme="dynamic"))
    called = (model.layers[0], *model.pair, *model.named.values())
    assert all(isinstance(module, FP8Linear) for module in called) and model.layers is before
    assert not torch.equal(model(x), expected) and torch.allclose(model(x), expected, atol=0.2)
    dequantize(model)
    called = (model.layers[0], *model.pair, *model.named.values())
    assert all(type(module) is nn.Linear for module in called)
