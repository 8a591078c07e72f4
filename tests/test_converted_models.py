"""A converted model as a model: ties, casts, copies, state dicts, hooks and flags."""

import copy

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from optimum_fp8 import FP8Config, convert, prepare
from optimum_fp8.modules import FP8Linear
from optimum_fp8.state import state_of


def net():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 16), nn.ReLU(), Conv1D(4, 16), nn.Softmax(-1)
    ).eval()


def batch():
    return torch.randn(5, 3, 4, 4)


def converted(model=None, x=None):
    model = prepare(net() if model is None else model, FP8Config(activation_scheme="static", target="cpu"))
    model(batch() if x is None else x)
    return convert(model)


@pytest.mark.core
def test_tied_weights_stay_tied():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    converted(model, torch.randn(2, 4))
    assert model[0].weight is model[2].weight and model[0].weight_scale is model[2].weight_scale
    assert model[0].weight is not model[1].weight
    assert model[0].bias is not model[2].bias


def test_a_module_in_two_places_stays_one_module():
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared)})
    convert(model, FP8Config(activation_scheme="dynamic"))
    assert isinstance(model["a"], FP8Linear) and model["a"] is model["b"][0]


@pytest.mark.core
@pytest.mark.parametrize(
    "cast, dtype",
    [
        (lambda model: model.half(), torch.float16),
        (lambda model: model.double(), torch.float64),
        (lambda model: model.to(torch.float16), torch.float16),
        (lambda model: model.to("cpu", torch.bfloat16), torch.bfloat16),
        (lambda model: model.half().float(), torch.float32),
    ],
    ids=["half", "double", "to float16", "to cpu, bfloat16", "there and back"],
)
def test_casts_keep_fp8_weights_and_float32_scales(cast, dtype):
    model = converted()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert cast(model) is model
    for name, tensor in model.state_dict().items():
        if name.endswith(("weight", "scale")):
            assert tensor.dtype == before[name].dtype and torch.equal(tensor, before[name]), name
        else:
            assert tensor.dtype == dtype, name
    assert model(batch().to(dtype)).dtype == dtype


def test_a_deep_copy_computes_the_same_and_is_independent():
    model, x = converted(), batch()
    clone = copy.deepcopy(model)
    assert torch.equal(clone(x), model(x))
    clone[3].weight_scale.mul_(2)
    assert not torch.equal(clone(x), model(x))


def test_a_deep_copy_of_a_prepared_model_measures_on_its_own_account():
    model = prepare(net(), FP8Config())
    model(torch.ones(1, 3, 4, 4))
    clone = copy.deepcopy(model)
    clone(torch.full((1, 3, 4, 4), 9.0))
    assert state_of(model).measurements.maxabs("0") == 1.0
    assert state_of(clone).measurements.maxabs("0") == 9.0


@pytest.mark.core
def test_a_state_dict_goes_into_another_converted_copy():
    original, x = net(), batch()
    model, other = converted(original, x), converted(net(), x * 50)
    assert not torch.equal(other(x), model(x))
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x), model(x))
    for name in ("3.weight", "3.weight_scale", "3.input_scale", "0.input_scale", "5.bias"):
        assert name in model.state_dict()


def test_hooks_of_the_user_survive():
    model, calls = net(), []
    before = model[3].register_forward_pre_hook(lambda *args: calls.append("before"))
    after = model[3].register_forward_hook(lambda *args, **kwargs: calls.append("after"), with_kwargs=True)
    converted(model)
    calls.clear()
    model(batch())
    assert calls == ["before", "after"]
    before.remove()
    after.remove()
    model(batch())
    assert len(calls) == 2


def test_hooks_that_are_always_called_still_are():
    model, calls = net(), []
    model[3].register_forward_hook(lambda *args: calls.append("after"), always_call=True)
    converted(model)
    calls.clear()
    with pytest.raises(RuntimeError):
        model[3](torch.ones(1, 5))
    assert calls == ["after"]


@pytest.mark.parametrize("training", [True, False])
def test_the_training_flag_is_kept(training):
    model = converted(net().train(training))
    assert model[3].training is training and model.training is training
