"""DeepSpeed's layers: what copies share, the head's part of its input, and versions without a group."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from deepspeed_layers import Block, LinearLayer
from torch import nn

from optimum_fp8 import FP8Config, convert, dequantize
from optimum_fp8.modules import FP8LinearBase
from optimum_fp8.modules.deepspeed_linear import FP8LmHeadLinearAllreduce

WEIGHT_ONLY = {"target": "cpu", "activation_scheme": "weight_only"}


class Group:
    def __deepcopy__(self, memo):
        raise TypeError("cannot be copied")


def test_copies_speak_over_the_same_group():
    model = convert(nn.Sequential(LinearLayer(nn.Linear(8, 4), None)), FP8Config(**WEIGHT_ONLY))
    group = model[0].origin.mp_group = model[0].mp_group = Group()
    made = copy.deepcopy(model)
    assert made[0].mp_group is group and made[0].codes is not model[0].codes
    x = torch.randn(2, 8)
    assert torch.equal(made(x), model(x)) and made[0].record is not model[0].record


def test_their_own_attributes_come_back():
    model = convert(Block(), FP8Config(**WEIGHT_ONLY))
    assert model.down.name == "down", "of the module in its model"
    dequantize(model)
    assert model.down.name == "of DeepSpeed" and model.scoped_up.bias is None and not hasattr(model.down, "codes")


@pytest.mark.parametrize(
    "rank, sizes, expected",
    [(0, None, [0, 1, 2, 3]), (1, None, [4, 5, 6]), (2, None, [7, 8, 9]), (1, [2, 5, 3], [2, 3, 4, 5, 6])],
)
def test_a_head_takes_its_part_of_the_input(rank, sizes, expected):
    module = SimpleNamespace(
        mp_group="a group", tp_world_size=3, tp_index=rank, **({"_partition_sizes": sizes} if sizes else {})
    )
    part = FP8LmHeadLinearAllreduce.own_part(module, torch.arange(10).expand(2, 1, 10))
    assert part.tolist() == [[expected]] * 2


def test_older_layers_without_a_group_are_known_by_their_package():
    class Old(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.randn(4, 8)), None

        def forward(self, input):
            return torch.matmul(input, self.weight.transpose(-1, -2))

    Old.__name__, Old.__module__ = "LinearLayer", "deepspeed.module_inject.layers"
    model = convert(nn.Sequential(Old()), FP8Config(**WEIGHT_ONLY))
    assert isinstance(model[0], FP8LinearBase) and not isinstance(model[0], nn.Linear)
    assert model(torch.randn(2, 8)).shape == (2, 4)
