"""Parameters that change behind a module's back: the next call computes with what is there, whoever put it there."""

import pytest
import torch
from accelerate.utils import set_module_tensor_to_device
from grids import over
from torch import nn

from optimum_fp8 import FP8Config, convert, prepare
from optimum_fp8.errors import FP8StateError
from optimum_fp8.modules.weight import stored_weight

LAYERS = {
    "linear": (lambda: nn.Linear(64, 32), (3, 64)),
    "conv": (lambda: nn.Conv2d(4, 8, 3), (2, 4, 7, 7)),
}
NAMES = ("weight", "weight_scale", "input_scale", "bias")


def made(kind, seed, static=True):
    """An FP8 module with a weight, scales by channel, a static input scale and a bias, and an input."""
    torch.manual_seed(seed)
    layer, shape = LAYERS[kind]
    options = {"scale_method": "act_maxabs_hw_weights_pcs_maxabs_pow2"}
    if static:
        options |= {"activation_scheme": "static"}
        model = prepare(nn.Sequential(layer()), FP8Config(**options, quantize_lm_head=True))
        with torch.no_grad():
            model(torch.randn(shape) * seed)
        return convert(model)[0], torch.randn(shape)
    config = FP8Config(**options, activation_scheme="weight_only", quantize_lm_head=True)
    return convert(nn.Sequential(layer()), config)[0], torch.randn(shape)


def by_dict(module, name, tensor):
    module._parameters[name] = nn.Parameter(tensor.clone(), requires_grad=False)


def by_attribute(module, name, tensor):
    setattr(module, name, nn.Parameter(tensor.clone(), requires_grad=False))


def by_accelerate(module, name, tensor):
    set_module_tensor_to_device(module, name, "meta")
    set_module_tensor_to_device(module, name, "cpu", value=stored_weight(tensor) if name == "weight" else tensor)


def by_state_dict(module, name, tensor, assign=False):
    state = {key: value.clone() for key, value in module.state_dict().items()}
    state[name] = (stored_weight(tensor) if name == "weight" else tensor).clone()
    module.load_state_dict(state, assign=assign)


def by_assigned_state_dict(module, name, tensor):
    by_state_dict(module, name, tensor, assign=True)


def by_data(module, name, tensor):
    module._parameters[name].data = tensor.clone()


def by_copy(module, name, tensor):
    module._parameters[name].view(torch.uint8).copy_(tensor.view(torch.uint8))


def by_swap(module, name, tensor):
    torch.utils.swap_tensors(module._parameters[name], nn.Parameter(tensor.clone(), requires_grad=False))


WAYS = [by_dict, by_attribute, by_accelerate, by_state_dict, by_assigned_state_dict, by_data, by_copy, by_swap]


@pytest.mark.core
@over(kind=LAYERS, way=WAYS, static=[False, True], name=NAMES)
@torch.no_grad()
def test_the_next_call_sees_it(kind, way, static, name):
    module, x = made(kind, 1, static)
    other, _ = made(kind, 5, static)
    if module._parameters[name] is None:
        return
    before = [module(x), module(x)][1]
    expected_module, _ = made(kind, 1, static)
    tensor = other._parameters[name].data
    tensor = tensor if name == "weight" else tensor * 3
    expected_module._parameters[name] = nn.Parameter(
        tensor, requires_grad=False
    )  # never called before: nothing is known of it
    expected = expected_module(x)
    way(module, name, tensor)
    for _ in range(2):
        assert torch.equal(module(x), expected)
    assert not torch.equal(before, expected)
    assert sum(module.record.kernels.values()) == 4  # each call is counted


@over(kind=LAYERS, static=[False, True], called_before=[False, True])
def test_a_weight_without_values_is_refused(kind, static, called_before):
    module, x = made(kind, 1, static)
    weight = module._parameters["weight"]
    expected = module(x) if called_before else None
    with torch.no_grad():
        module._parameters["weight"] = nn.Parameter(weight.to("meta"), requires_grad=False)
        with pytest.raises(FP8StateError, match="is on the meta device"):
            module(x)
        module._parameters["weight"] = weight
        assert module(x).isfinite().all() and (expected is None or torch.equal(module(x), expected))


@over(kind=LAYERS)
def test_modules_move_by_swapping(kind):
    module, x = made(kind, 1)
    with torch.no_grad():
        expected = module(x)
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        module.to(torch.float64).to(torch.float32)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    with torch.no_grad():
        assert torch.equal(module(x), expected)
