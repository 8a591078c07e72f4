"""Whole models after start-up: each scale that an operator is given is a number, or a tensor that was marked constant.

The bridge marks tensors by their names in a model's state dict; what it marked, and what each operator was given, the
emulator tells.
"""

from __future__ import annotations

import pytest
import torch
from gaudi_expert_models import IDS as EXPERT_IDS
from gaudi_expert_models import GaudiMixtral, VllmMixtral, expert_model
from hf.conftest import llama
from torch import nn

from optimum_fp8 import FP8Config, convert, ops, prepare, start_on_gaudi
from optimum_fp8.modules.handler import converted_modules
from optimum_fp8.test_utils import gaudi

IDS = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(0))
STEPS = 4


class Images(nn.Module):
    """Convolutions of one and of two dimensions, and a linear layer."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, padding=1)
        self.second = nn.Conv2d(16, 16, 3, stride=2, groups=2)
        self.third = nn.Conv1d(16, 16, 3)
        self.head = nn.Linear(16, 8)

    def forward(self, x):
        x = self.third(self.second(self.first(x).relu()).relu().flatten(2))
        return self.head(x.mean(-1))


def images():
    x = torch.randn(2, 3, 12, 12).bfloat16()
    return Images().bfloat16().eval(), lambda model: model(x), {}


def language():
    """Prompts and steps, with attention and the cache in FP8."""

    def run(model):
        model.generate(IDS, max_new_tokens=STEPS, min_new_tokens=STEPS, do_sample=False)

    return llama().bfloat16(), run, {"attention": True, "kv_cache": True, "attention_dataflow": "fused"}


def experts(model_class):
    return expert_model(model_class), lambda model: model(EXPERT_IDS), {}


MODELS = {
    "llama": language,
    "convolutions": images,
    "experts of optimum-habana": lambda: experts(GaudiMixtral),
    "experts of vLLM": lambda: experts(VllmMixtral),
}


def held_scales(model):
    """The scales of all converted modules by their keys in a state dict."""
    found = {}
    for name, (module, handler) in converted_modules(model).items():
        found |= {f"{name}.{key}": tensor for key, tensor in handler.state(module).items() if key.endswith("scale")}
    return found


CASES = [
    ("llama", "gaudi2", "scalar", "1.24"),
    ("llama", "gaudi3", "const", "1.19"),
    ("convolutions", "gaudi2", "const", "1.24"),
    ("convolutions", "gaudi3", "scalar", "1.19"),
    ("experts of optimum-habana", "gaudi2", "scalar", "1.24"),
    ("experts of vLLM", "gaudi3", "scalar", "1.24"),
]


@pytest.mark.parametrize("name, chip, scale_format, bridge", CASES, ids=lambda value: value)
def test_all_scales_are_constants(name, chip, scale_format, bridge):
    """All have one element, are in the state dict by a name with "scale" in it, and are in the hardware's set."""
    model, run, options = MODELS[name]()
    config = FP8Config(target=chip, scale_format=scale_format, **options)
    with torch.no_grad(), gaudi.emulated(chip, bridge=bridge) as device:
        prepare(model, config)
        run(model)
        convert(model)
        with ops.backend("hpu"):
            start_on_gaudi(model)
            started = len(device.calls)
            run(model)
    keys, scales = set(model.state_dict()), held_scales(model)
    assert all(scale.numel() == 1 for key, scale in scales.items() if "intermediate" not in key)  # it is one an expert
    assert scales and scales.keys() <= keys and all("scale" in key for key in scales)
    assert {key for key in keys if "scale" in key} <= device.constants.keys()
    given = {
        ((call.name, argument), scale)
        for call in device.calls[started:]
        for argument, several in call.scales.items()
        for scale in several
    }
    assert given and {where for where, scale in given if not scale.constant} == set()
    assert all(scale.hardware for _, scale in given)
    overloads = {call.overload for call in device.calls[started:] if call.name == "cast_to_fp8_v2"}
    assert overloads == ({"scalar"} if scale_format == "scalar" else {"default"})


def test_what_is_not_marked_costs_something():
    """Without start-up tensors are not constants: the check above can fail."""
    model, run, options = language()
    with torch.no_grad(), gaudi.emulated("gaudi2", lazy=False) as device, ops.backend("hpu"):
        prepare(model, FP8Config(target="gaudi2", scale_format="const", **options))
        run(model)
        convert(model)
        run(model)
    products = [call for call in device.calls if call.name == "fp8_gemm_v2"]
    assert products and not any(call.free_scales for call in products)
