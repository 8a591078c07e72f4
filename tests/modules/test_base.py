"""A converted model as a model: ties, casts, copies, state dicts, hooks and flags."""

import copy

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from optimum_fp8 import FP8Config, convert, dequantize, prepare
from optimum_fp8.errors import FP8ConfigError, FP8StateError
from optimum_fp8.lifecycle.state import state_of
from optimum_fp8.modules import FP8Linear


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
    assert model[0].codes is model[2].codes and model[0].weight_scale is model[2].weight_scale
    assert model[0].codes is not model[1].codes
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
    assert state_of(model).measurements.range("0") == 1.0
    assert state_of(clone).measurements.range("0") == 9.0


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


def test_a_state_dict_of_a_part_cannot_be_taken_for_values():
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 3)))
    convert(model[0], FP8Config(activation_scheme="dynamic"))
    state = model.state_dict()
    assert state["0.0.weight"].shape == (1, 3, 4) and model[0][0].weight.shape == (3, 4)
    with pytest.raises(RuntimeError, match="size mismatch"):
        nn.Sequential(nn.Sequential(nn.Linear(4, 3))).load_state_dict(state, strict=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.update({"0.weight": torch.ones(3, 4)}), "expected FP8 codes"),
        (lambda state: state.pop("0.weight_scale"), "weight_scale is missing"),
        (lambda state: state["0.weight_scale"].zero_(), "expected finite values above 0"),
    ],
)
@pytest.mark.parametrize("assign", [False, True])
def test_unsound_state_dicts_are_refused(change, message, assign):
    model = convert(nn.Sequential(nn.Linear(4, 3)), FP8Config(activation_scheme="dynamic"))
    before, state = model(torch.ones(1, 4)), {key: value.clone() for key, value in model.state_dict().items()}
    change(state)
    with pytest.raises(RuntimeError, match=message):
        model.load_state_dict(state, strict=False, assign=assign)
    assert torch.equal(model(torch.ones(1, 4)), before)


@pytest.mark.parametrize("x", [torch.ones(2, 4, dtype=torch.int64), torch.ones(2, 4).to(torch.float8_e5m2)])
def test_inputs_that_are_not_high_precision_are_refused(x):
    model = convert(nn.Sequential(nn.Linear(4, 3)), FP8Config(activation_scheme="dynamic"))
    with pytest.raises(FP8StateError, match="expects high precision"):
        model(x)


def test_a_weight_put_in_by_hand_is_refused():
    model = convert(nn.Sequential(nn.Linear(4, 3)), FP8Config(activation_scheme="dynamic"))
    model[0].weight = nn.Parameter(torch.ones(3, 4))
    with pytest.raises(FP8StateError, match="was replaced by one in torch.float32"):
        model(torch.ones(1, 4))


def test_dequantize_any_module():
    model = nn.Sequential(nn.Linear(4, 3), nn.Conv2d(1, 2, 3))
    original = copy.deepcopy(model)
    convert(model, FP8Config(activation_scheme="weight_only"))
    dequantize(model)
    assert [type(module) for module in model] == [nn.Linear, nn.Conv2d]
    assert torch.allclose(model[0].weight, original[0].weight, rtol=0.07)
    prepare(model, FP8Config())  # it can start again


@pytest.mark.parametrize(
    ("model", "config"), [("m", FP8Config()), (nn.Sequential(), {"a": 1}), (nn.Sequential(), FP8Config)]
)
@pytest.mark.parametrize("step", [prepare, convert])
def test_wrong_arguments_say_what_was_expected(step, model, config):
    with pytest.raises((FP8StateError, FP8ConfigError), match="expected an? (torch.nn.Module|FP8Config)"):
        step(model, config)


def test_a_hook_that_comes_after_the_observer_is_named(caplog):
    model = prepare(nn.Sequential(nn.Linear(4, 3)), FP8Config())
    model[0].register_forward_pre_hook(lambda module, args: (args[0] * 100,))
    model(torch.ones(1, 4))
    convert(model)
    assert "registered after measuring began" in caplog.text and "'0'" in caplog.text


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("scheme", ["static", "weight_only"])
def test_dequantize_gives_back_the_original_dtype(dtype, scheme):
    model, x = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 3, bias=False)).to(dtype), torch.ones(1, 4)
    prepare(model, FP8Config(activation_scheme=scheme))
    model(x.to(dtype))
    convert(model)
    assert dequantize(copy.deepcopy(model))(x.to(dtype)).dtype == dtype
    cast = copy.deepcopy(model).to(torch.float64)
    assert {module.weight.dtype for module in dequantize(cast)} == {torch.float64}, "as it would have been cast"
