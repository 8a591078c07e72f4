"""What `.weight` of an FP8 module is for code that computes, and for code that moves parameters."""

from __future__ import annotations

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from accelerate import cpu_offload, dispatch_model
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from accelerate.utils import set_module_tensor_to_device
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import nn
from torch.nn.utils import prune
from transformers.pytorch_utils import Conv1D

from optimum_fp8 import FP8Config, convert
from optimum_fp8.errors import FP8NotAvailableError, FP8StateError
from optimum_fp8.modules import FP8Weight
from optimum_fp8.scales import PerBlock, PerTensor, ScaleMethod, ScaleRule, register_method

LAYERS = {
    "linear": (lambda: nn.Linear(8, 6), (3, 8)),
    "conv1d of transformers": (lambda: Conv1D(6, 8), (3, 8)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3), (2, 4, 5, 5)),
}
METHODS = ["maxabs_hw", "maxabs_pcs_pow2"]


def fp8(layer: nn.Module, method: str = "maxabs_hw", scheme: str = "weight_only") -> nn.Sequential:
    return convert(nn.Sequential(layer), FP8Config(activation_scheme=scheme, scale_method=method))


@pytest.mark.core
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", LAYERS)
def test_it_is_the_parameter_that_was_there(kind, method, dtype):
    layer = LAYERS[kind][0]().to(dtype)
    original = copy.deepcopy(layer)
    weight = fp8(layer, method)[0].weight
    assert isinstance(weight, nn.Parameter) and isinstance(weight, FP8Weight)
    assert (weight.shape, weight.dtype, weight.device) == (original.weight.shape, dtype, original.weight.device)
    assert not weight.requires_grad and weight.is_floating_point()
    assert torch.allclose(weight.float(), original.weight.float(), rtol=2**-4, atol=1e-2)


@torch.no_grad()
@pytest.mark.parametrize("method", METHODS)
def test_products_with_it_are_those_with_the_values(method):
    linear, conv1d, x = fp8(nn.Linear(8, 6), method)[0], fp8(Conv1D(6, 8), method)[0], torch.randn(3, 8)
    values = linear.dequantized_weight(torch.float32)
    for found in (F.linear(x, linear.weight), x @ linear.weight.T, torch.matmul(x, linear.weight.data.t())):
        assert torch.equal(found, x @ values.T)
    assert torch.equal(x @ conv1d.weight, x @ conv1d.dequantized_weight(torch.float32).T)
    assert torch.equal(torch.cat([linear.weight, linear.weight]), torch.cat([values, values]))
    assert torch.equal(linear.weight[2:4, 1], values[2:4, 1]) and linear.weight.tolist() == values.tolist()
    assert type(linear.weight + 1) is torch.Tensor


def test_scales_by_blocks():
    name = "blocks_of_weights"
    activation = ScaleRule(PerTensor(), "maxabs", "identity")
    register_method(ScaleMethod(name, ScaleRule(PerBlock(128, 128), "maxabs", "identity"), activation))
    linear = fp8(nn.Linear(200, 150), name)[0]
    assert torch.equal(linear.weight + 0, linear.dequantized_weight(torch.float32))
    assert torch.equal(linear.weight.t() + 0, linear.dequantized_weight(torch.float32).t())


WRITES = {
    "fill_": lambda module: module.weight.fill_(1),
    "copy_": lambda module: module.weight.copy_(torch.ones(6, 8)),
    "data in place": lambda module: module.weight.data.mul_(2),
    "a row": lambda module: module.weight.data.__setitem__(0, 1.0),
    "init": lambda module: nn.init.normal_(module.weight),
    "several": lambda module: torch._foreach_mul_([module.weight, torch.ones(2)], 2),
    "out": lambda module: torch.add(module.weight, 1, out=module.weight),
}


@torch.no_grad()
@pytest.mark.parametrize("write", WRITES)
def test_it_cannot_be_written_to(write):
    module, x = fp8(nn.Linear(8, 6))[0], torch.randn(3, 8)
    expected = module(x)
    with pytest.raises(FP8NotAvailableError, match=r"read-only|cannot be written to"):
        WRITES[write](module)
    assert torch.equal(module(x), expected)


def test_a_parameter_made_of_it_holds_the_values():
    module = fp8(nn.Linear(8, 6))[0]
    other = nn.Linear(8, 6)
    other.weight = nn.Parameter(module.weight.clone())
    assert type(other.weight) is nn.Parameter and other.weight.requires_grad
    assert torch.equal(other.weight, module.dequantized_weight(torch.float32))
    other.weight = module.weight  # tied to values that cannot change
    x = torch.randn(3, 8)
    assert torch.equal(other(x), F.linear(x, module.dequantized_weight(torch.float32), other.bias))


def test_copies_and_files_hold_the_values():
    module = fp8(nn.Linear(8, 6))[0]
    values = module.dequantized_weight(torch.float32)
    file = io.BytesIO()
    torch.save({"w": module.weight}, file)
    file.seek(0)
    saved = torch.load(file)["w"]
    assert type(saved) is torch.Tensor and torch.equal(saved, values)
    assert isinstance(copy.deepcopy(module.weight), FP8Weight) and torch.equal(copy.deepcopy(module.weight), values)
    assert torch.equal(torch.from_dlpack(module.weight), values)


def test_memory_that_is_not_there_is_not_shared():
    module = fp8(nn.Linear(8, 6))[0]
    with pytest.raises(FP8NotAvailableError, match=r"share a clone\(\)"):
        module.weight.share_memory_()


@pytest.mark.parametrize(
    "change",
    [
        lambda module: prune.l1_unstructured(module, "weight", 0.5),
        lambda module: nn.utils.parametrizations.weight_norm(module),
        lambda module: nn.utils.parametrizations.spectral_norm(module),
    ],
    ids=["prune", "weight_norm", "spectral_norm"],
)
def test_what_would_replace_the_weight_is_refused_by_name(change):
    model, x = fp8(nn.Linear(8, 6)), torch.randn(3, 8)
    expected = model(x)
    with pytest.raises(FP8NotAvailableError, match=r"^0: the weight .*dequantize"):
        change(model[0])
    assert torch.equal(model(x), expected)


def test_given_to_another_fp8_module_its_codes_and_scale_go_along():
    one, other, x = fp8(nn.Linear(8, 6)), fp8(nn.Linear(8, 6)), torch.randn(3, 8)
    other[0].weight, other[0].bias = one[0].weight, one[0].bias
    assert other[0].codes.data_ptr() == one[0].codes.data_ptr() and torch.equal(other(x), one(x))


# --- code that moves parameters -----------------------------------------------------------------------------------


@pytest.mark.core
def test_movers_find_the_codes():
    model = fp8(nn.Linear(8, 6))
    for found in (
        model.get_parameter("0.weight"),
        dict(model.named_parameters())["0.weight"],
        model[0]._parameters["weight"],
    ):
        assert found is model[0].codes and found.dtype == torch.float8_e4m3fn
    assert model.state_dict()["0.weight"].shape == (1, 6, 8)


@torch.no_grad()
@pytest.mark.parametrize("scheme", ["dynamic", "weight_only"])
@pytest.mark.parametrize("kind", LAYERS)
def test_accelerate_offloads_and_brings_back(kind, scheme):
    make, shape = LAYERS[kind]
    model, x = fp8(make(), scheme=scheme), torch.randn(shape)
    expected = model(x)
    cpu_offload(model, execution_device=torch.device("cpu"))
    for _ in range(2):
        assert model[0]._parameters["weight"].is_meta
        assert model[0].weight.dtype == torch.float32 and model[0].weight.is_meta, "questions about it are answered"
        assert torch.equal(model(x), expected)
    model = fp8(make(), scheme=scheme)
    hook = AlignDevicesHook("cpu", offload=True, weights_map=model[0].state_dict())
    expected = model(x)
    add_hook_to_module(model[0], hook)
    assert model[0].codes.is_meta and torch.equal(model(x), expected)


@torch.no_grad()
def test_accelerate_offloads_to_disk(tmp_path):
    model, x = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 6)), torch.randn(3, 8)
    convert(model, FP8Config(activation_scheme="dynamic"))
    expected = model(x)
    dispatch_model(
        model, {"0": "cpu", "1": "cpu", "2": "disk"}, offload_dir=tmp_path, main_device="cpu", force_hooks=True
    )
    assert model[2].codes.is_meta and torch.equal(model(x), expected) and model[2].codes.is_meta


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("x_on", ["cpu", "meta"])
def test_a_weight_that_is_not_there_is_refused_by_name(kind, x_on):
    make, shape = LAYERS[kind]
    model = fp8(make())
    set_module_tensor_to_device(model[0], "weight", "meta")
    x = torch.randn(shape)
    if x_on == "meta":  # a computation without values
        assert model.to("meta")(x.to("meta")).is_meta
    else:
        with pytest.raises(FP8StateError, match=r"^0: the weight of an FP8 module is on the meta device"):
            model(x)


CHANGES = {
    "set": lambda module, codes: setattr(module, "weight", nn.Parameter(codes, requires_grad=False)),
    "past the module": lambda module, codes: module._parameters.update(weight=nn.Parameter(codes, requires_grad=False)),
    "past the module, as stored": lambda module, codes: module._parameters.update(
        weight=nn.Parameter(codes[None], requires_grad=False)
    ),
    "accelerate": lambda module, codes: set_module_tensor_to_device(module, "weight", "cpu", value=codes),
    "accelerate, from meta": lambda module, codes: (
        set_module_tensor_to_device(module, "weight", "meta"),
        set_module_tensor_to_device(module, "weight", "cpu", value=codes[None]),
    ),
    "in place": lambda module, codes: module.codes.copy_(codes),
    "data": lambda module, codes: setattr(module.codes, "data", codes),
    "load_state_dict": lambda module, codes: module.load_state_dict(module.state_dict() | {"weight": codes[None]}),
    "load_state_dict, assigned": lambda module, codes: module.load_state_dict(
        module.state_dict() | {"weight": codes[None]}, assign=True
    ),
}


@torch.no_grad()
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", LAYERS)
def test_every_way_in_which_a_weight_changes_is_noticed(kind, change):
    make, shape = LAYERS[kind]
    module, x = fp8(make())[0], torch.randn(shape)
    for _ in range(3):
        before = module(x)  # prepared by now
    codes = (module.codes.float() * -2).to(torch.float8_e4m3fn)
    CHANGES[change](module, codes)
    again = module(x)
    bias = module.bias.reshape(-1, *[1] * (again.ndim - 2)) if again.ndim > 2 else module.bias
    assert torch.allclose(again - bias, (before - bias) * -2, rtol=1e-4, atol=1e-5)
    assert module.codes.shape == module.weight_shape


# --- ways out -----------------------------------------------------------------------------------------------------


def test_every_file_of_a_state_dict_is_protected_and_comes_back(tmp_path):
    model, other, x = fp8(nn.Linear(8, 6)), fp8(nn.Linear(8, 6)), torch.randn(3, 8)
    save_file(model.state_dict(), tmp_path / "a.safetensors")
    other.load_state_dict(load_file(tmp_path / "a.safetensors"))
    assert torch.equal(other(x), model(x))
    save_model(model, str(tmp_path / "b.safetensors"))
    third = fp8(nn.Linear(8, 6))
    load_model(third, str(tmp_path / "b.safetensors"))
    assert torch.equal(third(x), model(x))
    with pytest.raises(RuntimeError, match="size mismatch"):
        nn.Sequential(nn.Linear(8, 6)).load_state_dict(load_file(tmp_path / "a.safetensors"), strict=False)


def test_functional_call_replaces_the_codes():
    model, x = fp8(nn.Linear(8, 6)), torch.randn(3, 8)
    flipped = {name: x.clone() for name, x in model.named_parameters()}
    flipped["0.weight"] = (flipped["0.weight"].float() * -1).to(torch.float8_e4m3fn)
    found, bias = torch.func.functional_call(model, flipped, (x,)), model[0].bias
    assert torch.allclose(found - bias, bias - model(x), atol=1e-6)


@torch.no_grad()
def test_compiled_code_reads_it_too():
    class Casts(nn.Module):
        def __init__(self):
            super().__init__()
            self.proj = nn.Linear(8, 8)

        def forward(self, x):
            return self.proj(x.to(self.proj.weight.dtype))

    model, x = Casts().bfloat16(), torch.randn(3, 8)
    convert(nn.Sequential(model), FP8Config(activation_scheme="weight_only"))
    assert torch.equal(torch.compile(model, backend="aot_eager", fullgraph=True)(x), model(x))
    multiply = torch.compile(lambda x, w: x @ w.T * 2, backend="aot_eager", fullgraph=True)
    assert torch.equal(multiply(x.bfloat16(), model.proj.weight), x.bfloat16() @ model.proj.weight.T * 2)
