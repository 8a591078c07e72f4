"""Start-up of the bridge: each generation's calls, in their order, and only with models that lie on the card."""

from __future__ import annotations

import importlib

import pytest
import torch
from hf.conftest import llama
from torch import nn
from transformers import AutoModelForCausalLM

from optimum_fp8 import FP8Config, convert, load, ops, prepare, save, start_on_gaudi
from optimum_fp8.errors import FP8NotAvailableError, FP8StateError
from optimum_fp8.ops.hpu import startup
from optimum_fp8.test_utils import gaudi

CALLS = {
    "1.19": ("hpu_set_inference_env", "hpu_inference_initialize"),
    "1.24": ("hpu_inference_set_env", "hpu_inference_initialize"),
}
OLD = ("hpu_set_env", "hpu_initialize")
CONFIG = FP8Config(target="gaudi2", activation_scheme="weight_only")
IDS = torch.arange(3, 13).view(1, 10)


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.register_buffer("input_scale", torch.ones(1))


@pytest.mark.core
@pytest.mark.parametrize("bridge", gaudi.BRIDGES)
def test_each_generations_calls(bridge):
    with gaudi.emulated("gaudi2", bridge=bridge) as device:
        startup.set_up()
        startup.set_up()
        assert device.events == [CALLS[bridge][0]]
        startup.initialize(Scaled())
    assert device.events == list(CALLS[bridge]) and list(device.constants) == ["input_scale"]


def test_a_bridge_with_the_first_names_alone(gaudi2):
    core = importlib.import_module("habana_frameworks.torch.core")
    for name in {*CALLS["1.19"], *CALLS["1.24"]}:
        delattr(core, name)
    startup.initialize(Scaled())
    assert gaudi2.events == list(OLD) and list(gaudi2.constants) == ["input_scale"]
    for name in OLD:
        delattr(core, name)
    with pytest.raises(FP8NotAvailableError, match="has none of hpu_inference_initialize, hpu_initialize"):
        startup.initialize(Scaled())


@pytest.mark.core
def test_each_bridge_is_set_up():
    for _ in range(2):
        with gaudi.emulated("gaudi3") as device:
            startup.set_up()
        assert device.events == [CALLS["1.24"][0]]
    with pytest.raises(FP8NotAvailableError, match="no Intel Gaudi, or its PyTorch bridge is not loaded"):
        startup.set_up()


def test_inverses_are_constants_too(gaudi2):
    model = Scaled()
    model.weight_scale = nn.Parameter(torch.ones(1))
    for scale in (model.input_scale, model.weight_scale):
        ops.keep_inverse(scale)
    startup.initialize(model)
    for scale in (model.input_scale, model.weight_scale):
        inverse = ops.inverse_of(scale)
        assert gaudi2.is_constant(inverse) and inverse is ops.inverse_of(scale)
    scales = ["weight_scale", "input_scale"]
    assert list(gaudi2.constants) == [*scales, *(f"{name}_inverse" for name in scales)]
    assert list(model.state_dict())[1:] == scales
    model.input_scale.mul_(4)
    assert ops.inverse_of(model.input_scale) == 0.25 and not gaudi2.is_constant(ops.inverse_of(model.input_scale))


# --- when it happens --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lazy", [True, False])
def test_converting_on_the_card(lazy):
    with gaudi.emulated("gaudi2", lazy=lazy) as device, ops.backend("hpu"):
        model = convert(llama(), CONFIG)
        names = [name for name in model.state_dict() if "scale" in name]
    assert device.events == list(CALLS["1.24"])
    assert set(names) <= device.constants.keys() if lazy else not device.constants


def test_what_stays_on_the_cpu_is_not_initialized(gaudi2, tmp_path):
    convert(llama(), CONFIG).save_pretrained(tmp_path)
    AutoModelForCausalLM.from_pretrained(tmp_path)
    assert gaudi2.events == []


def events_when_modules_are_made(monkeypatch, device):
    """The events of the bridge before each module that is made from now on."""
    found, original = [], nn.Module.__init__

    def look(self, *args, **kwargs):
        found.append(list(device.events))
        original(self, *args, **kwargs)

    monkeypatch.setattr(nn.Module, "__init__", look)
    return found


@pytest.mark.core
def test_loading_onto_the_card(tmp_path, monkeypatch):
    """The first call comes before the model has any tensor, the second when it has all; a checkpoint's as well."""
    llama().save_pretrained(tmp_path / "plain")
    convert(llama(), CONFIG).save_pretrained(tmp_path / "fp8")
    for name, options in (("plain", {"quantization_config": CONFIG}), ("fp8", {})):
        with gaudi.emulated("gaudi2") as device, ops.backend("hpu"):
            before = events_when_modules_are_made(monkeypatch, device)
            model = AutoModelForCausalLM.from_pretrained(tmp_path / name, **options)
            monkeypatch.undo()
        assert before[0] == [CALLS["1.24"][0]] and device.events == list(CALLS["1.24"])
        assert {key for key in model.state_dict() if "scale" in key} <= device.constants.keys()


def test_a_device_map_tells_before_loading(gaudi2, tmp_path):
    """A device that is not there: transformers' error comes after the first call."""
    llama().save_pretrained(tmp_path)
    for device_map in ({"": "cpu"}, "cpu", {"model": "cpu", "lm_head": "disk"}, "auto"):
        AutoModelForCausalLM.from_pretrained(tmp_path, device_map=device_map, offload_folder=tmp_path / "off")
    assert gaudi2.events == []
    with pytest.raises(Exception, match="hpu"):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=CONFIG, device_map="hpu")
    assert gaudi2.events == [CALLS["1.24"][0]]


def test_loading_a_plain_module(tmp_path):
    def model():
        return nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32))

    save(convert(model(), CONFIG), tmp_path)
    with gaudi.emulated("gaudi2") as device, ops.backend("hpu"):
        load(tmp_path, model())
    assert device.events == list(CALLS["1.24"]) and "0.weight_scale" in device.constants


# --- by hand ----------------------------------------------------------------------------------------------------------


@pytest.mark.core
def test_by_hand():
    with gaudi.emulated("gaudi2") as device:
        model = convert(llama(), CONFIG)
        assert start_on_gaudi() is None and device.events == [CALLS["1.24"][0]]
        with ops.backend("hpu"):
            assert start_on_gaudi(model) is model
    assert device.events == list(CALLS["1.24"])
    assert {key for key in model.state_dict() if "scale" in key} <= device.constants.keys()


def test_a_model_on_the_cpu_is_moved_after_the_first_call(gaudi2):
    model = convert(llama(), CONFIG)
    model.to = lambda device: gaudi2.events.append(f"to {device}")
    start_on_gaudi(model)
    assert gaudi2.events == [CALLS["1.24"][0], "to hpu"]


def test_where_there_is_no_such_device(gaudi2):
    model = convert(llama(), CONFIG)
    with pytest.raises(FP8NotAvailableError, match=r"no device 'hpu' to move the model to; over an emulated bridge"):
        start_on_gaudi(model)
    with pytest.raises(FP8StateError, match="expected a converted model, found a str"):
        start_on_gaudi("model")


def test_only_converted_models_start(gaudi2):
    for model in (llama(), prepare(llama(), FP8Config(target="gaudi2"))):
        with pytest.raises(FP8StateError, match="was not converted to FP8: call convert"):
            start_on_gaudi(model)


def test_without_a_gaudi():
    with pytest.raises(FP8NotAvailableError, match="import habana_frameworks.torch first"):
        start_on_gaudi(convert(llama(), CONFIG))
