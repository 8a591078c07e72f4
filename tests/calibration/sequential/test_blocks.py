"""Blocks are found by how a model is built; what lies around them is split into as few parts as hold no block."""

from __future__ import annotations

import pytest
from torch import nn

from optimum_fp8.calibration.sequential.blocks import parts_of
from optimum_fp8.errors import FP8CalibrationError


class Layer(nn.Module):
    def __init__(self, experts=0):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.experts = nn.ModuleList(Layer() for _ in range(experts))


class Model(nn.Module):
    def __init__(self, **children):
        super().__init__()
        for name, child in children.items():
            self.add_module(name, child)


def selected(model):
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]


def parts(model):
    return list(parts_of(model, selected(model)))


def test_outermost_of_a_list():
    model = Model(layers=nn.ModuleList(Layer(experts=2) for _ in range(2)))
    assert parts(model) == ["layers.0", "layers.1"]


def test_towers_and_what_is_around_them():
    vision = Model(patches=Model(projection=nn.Linear(4, 4), norm=nn.LayerNorm(4)), blocks=nn.ModuleList([Layer()]))
    projector = Model(one=nn.Linear(4, 4), two=nn.Linear(4, 4))
    text = Model(embed=nn.Embedding(4, 4), layers=nn.ModuleList([Layer(), Layer()]), norm=nn.LayerNorm(4))
    model = Model(vision=vision, projector=projector, text=text, head=nn.Linear(4, 4))
    blocks = ["vision.blocks.0", "text.layers.0", "text.layers.1"]
    assert parts(model) == ["vision.patches", blocks[0], "projector", *blocks[1:], "head"]


def test_nothing_is_selected_around_blocks():
    model = Model(stem=nn.Linear(4, 4), layers=nn.ModuleList([Layer()]))
    assert list(parts_of(model, ["layers.0.linear"])) == ["layers.0"]


def test_lists_in_lists_and_sequences():
    model = Model(
        stages=nn.ModuleList([nn.ModuleList([Layer(), Layer()])]),
        more=nn.Sequential(Layer(), Layer()),
        head=nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)),
        acts=nn.ModuleList([nn.Sequential(nn.ReLU())]),
    )
    assert parts(model) == ["stages.0.0", "stages.0.1", "more.0", "more.1", "head"]


def test_classes_that_are_not_to_be_split():
    model = Model(layer_0=Layer(), layer_1=Layer(), head=nn.Linear(4, 4))
    model._no_split_modules = ["Layer"]
    assert parts(model) == ["layer_0", "layer_1", "head"]


def test_a_tower_that_is_not_to_be_split_is_gone_through_by_its_list():
    model = Model(tower=Model(layers=nn.ModuleList([Layer(), Layer()])))
    model._no_split_modules = ["Model"]
    assert parts(model) == ["tower.layers.0", "tower.layers.1"]


@pytest.mark.parametrize("model", [Model(one=Layer(), two=Layer()), Model(heads=nn.ModuleList([nn.Linear(4, 4)]))])
def test_no_blocks(model):
    with pytest.raises(FP8CalibrationError, match=r"has none.*calibration='whole'"):
        parts(model)


def test_shared_modules():
    layers = nn.ModuleList([Layer(), Layer()])
    layers[1].linear = layers[0].linear
    with pytest.raises(FP8CalibrationError, match=r"layers\.0 and layers\.1 share a Linear.*calibration='whole'"):
        parts(Model(layers=layers))
