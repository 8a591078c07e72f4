"""prepare, your loop, finalize_calibration, convert: on any module, whole or not at all."""

import copy
import logging
import os

import pytest
import torch
from tiny_models import tiny_llama
from torch import nn
from transformers.pytorch_utils import Conv1D

from optimum_fp8 import FP8Config, Measurements, convert, finalize_calibration, prepare, quantization_report
from optimum_fp8.errors import FP8MeasurementError, FP8ScaleError, FP8SelectionError, FP8StateError
from optimum_fp8.lifecycle.state import state_of
from optimum_fp8.modules import FP8Conv1D, FP8Conv2d, FP8Linear, fp8_modules

STATIC = {"activation_scheme": "static", "target": "cpu"}


def net():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 16), nn.ReLU(), Conv1D(4, 16), nn.Softmax(-1)
    ).eval()


def batch():
    return torch.randn(5, 3, 4, 4)


@pytest.fixture
def config(tmp_path):
    """A config whose measurements lie in the test's own folder."""

    def config(**options):
        return FP8Config(**{"dump_stats_path": str(tmp_path / "measure"), "target": "cpu", **options})

    return config


def converted(model=None, x=None, **options):
    model = prepare(net() if model is None else model, FP8Config(**{**STATIC, **options}))
    model(batch() if x is None else x)
    return convert(model)


# --- the flow -----------------------------------------------------------------------------------------------------


@pytest.mark.core
@pytest.mark.parametrize("finalize", [False, True])
def test_prepare_loop_convert(finalize, config):
    model, x = net(), batch()
    expected = model(x)
    assert prepare(model, config()) is model
    assert torch.equal(model(x), expected), "measuring changes nothing"
    if finalize:
        finalize_calibration(model)
    assert convert(model) is model
    assert {name: type(module) for name, module in fp8_modules(model).items()} == {
        "0": FP8Conv2d, "3": FP8Linear, "5": FP8Conv1D
    }  # fmt: skip
    assert {module.activations for module in fp8_modules(model).values()} == {"static"}
    y = model(x)
    assert y.shape == expected.shape and y.dtype == expected.dtype
    assert torch.allclose(y, expected, atol=0.05) and not torch.equal(y, expected)


@pytest.mark.core
@pytest.mark.parametrize("scheme", ["dynamic", "weight_only"])
def test_without_ranges_no_data_is_needed(scheme):
    model, x = net(), batch()
    expected = model(x)
    convert(model, FP8Config(activation_scheme=scheme, target="cpu"))
    assert {module.activations for module in fp8_modules(model).values()} == {scheme}
    assert torch.allclose(model(x), expected, atol=0.05)


def test_prepare_without_ranges_adds_no_hooks():
    model = prepare(net(), FP8Config(activation_scheme="dynamic"))
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    convert(model)


def test_convert_takes_all_hooks_off():
    model = converted()
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_fp8_weights_are_frozen():
    assert not any(module.weight.requires_grad for module in fp8_modules(converted()).values())


def test_auto_falls_to_dynamic_with_one_line(config, caplog):
    with caplog.at_level(logging.INFO, logger="optimum_fp8"):
        model = convert(net(), config())
    assert {module.activations for module in fp8_modules(model).values()} == {"dynamic"}
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "activation_scheme='dynamic'" in caplog.text


@pytest.mark.core
@pytest.mark.parametrize(
    "exclude, kinds",
    [
        ("NONE", {"input", "output", "weight"}),
        ("INPUT", {"output", "weight"}),
        ("OUTPUT", {"input", "weight"}),
        ("PARAMS", {"input", "output"}),
        ("ALL", set()),
    ],
)
def test_measure_exclude(exclude, kinds, config):
    model = prepare(net(), config(measure_exclude=exclude))
    model(batch())
    assert {kind for _, kind in state_of(model).measurements.tensors} == kinds
    convert(model)
    expected = "static" if "input" in kinds else "dynamic"
    assert {module.activations for module in fp8_modules(model).values()} == {expected}


def test_measuring_all_but_inputs_writes_what_was_measured(config):
    model = prepare(net(), config(measure_exclude="INPUT", mode="MEASURE"))
    model(batch())
    finalize_calibration(model)
    stored = Measurements.load(config().dump_stats_path)
    assert {kind for _, kind in stored.tensors} == {"output", "weight"}


# --- measurements in a file ---------------------------------------------------------------------------------------


@pytest.mark.core
def test_measurements_serve_another_process_with_the_same_weights(config):
    model, x = net(), batch()
    twin = copy.deepcopy(model).bfloat16().float()
    model.load_state_dict(twin.state_dict())
    prepare(model, config(mode="MEASURE"))
    model(x)
    finalize_calibration(model)
    convert(model)
    convert(twin, config(mode="QUANTIZE"))
    for name, module in fp8_modules(twin).items():
        assert torch.equal(module.input_scale, fp8_modules(model)[name].input_scale)
    assert torch.equal(twin(x), model(x))


@pytest.mark.core
def test_measurements_of_other_weights_are_refused(config, caplog):
    model = prepare(net(), config())
    model(batch())
    finalize_calibration(model)
    for options in ({"activation_scheme": "static"}, {"mode": "QUANTIZE"}):
        other = net()
        with pytest.raises(FP8MeasurementError, match="are of another model.*fingerprint"):
            convert(other, config(**options))
        assert not fp8_modules(other) and state_of(other) is None
    convert(other, config())
    assert "they are not used" in caplog.text
    assert {module.activations for module in fp8_modules(other).values()} == {"dynamic"}


def test_finalize_takes_the_observers_off_and_convert_needs_no_file(config):
    model = prepare(net(), config())
    x = batch()
    model(x)
    measurements = finalize_calibration(model)
    count = measurements.tensors["0", "input"].statistics()["count"].item()
    model(x)
    assert measurements.tensors["0", "input"].statistics()["count"].item() == count
    os.unlink(f"{config().dump_stats_path}_measurements.safetensors")
    convert(model)


# --- what cannot be done ------------------------------------------------------------------------------------------


def prepared():
    return prepare(net(), FP8Config())


@pytest.mark.core
@pytest.mark.parametrize(
    "make, step, message",
    [
        (prepared, lambda model: prepare(model, FP8Config()), "prepare: this model is prepared already"),
        (converted, lambda model: prepare(model, FP8Config()), "prepare: this model is converted to FP8 already"),
        (converted, convert, "convert: this model is converted to FP8 already"),
        (converted, lambda model: convert(model, FP8Config()), "convert: this model is converted to FP8 already"),
        (converted, finalize_calibration, "finalize_calibration: this model is already converted"),
        (net, convert, r"convert: this model was not prepared: call prepare\(model, config\)"),
        (net, finalize_calibration, "finalize_calibration: this model is not being measured"),
        (lambda: net().to("meta"), lambda model: prepare(model, FP8Config()), "offloaded or not loaded"),
    ],
)
def test_steps_out_of_order(make, step, message):
    with pytest.raises(FP8StateError, match=message):
        step(make())


def test_a_part_that_is_converted_already():
    model = nn.Sequential(converted(), nn.Linear(4, 4))
    with pytest.raises(FP8StateError, match="converted to FP8 already"):
        prepare(model, FP8Config())


def test_a_second_config_is_not_ignored():
    model = prepare(nn.Sequential(nn.Linear(4, 4)), FP8Config(target="cpu"))
    model(torch.ones(1, 4))
    with pytest.raises(FP8StateError, match="prepared with another config"):
        convert(model, FP8Config(target="cpu", scale_method="unit_scale"))


@pytest.mark.core
@pytest.mark.parametrize("step", [convert, finalize_calibration])
def test_static_activations_without_data(step):
    model = prepare(net(), FP8Config(**STATIC))
    with pytest.raises(FP8MeasurementError, match="need calibration data and none went through"):
        step(model)
    model(batch())
    convert(model)


def test_static_activations_without_a_file(config):
    model = net()
    with pytest.raises(FP8MeasurementError, match="no measurements at .*give a `dataset`"):
        convert(model, config(activation_scheme="static"))
    assert state_of(model) is None and not fp8_modules(model)


class Branches(nn.Module):
    """One of its layers is never called."""

    def __init__(self):
        super().__init__()
        self.used, self.unused = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.used(x)


@pytest.mark.core
def test_modules_never_reached_are_an_error():
    model = prepare(Branches(), FP8Config(**STATIC))
    model(torch.ones(1, 4))
    with pytest.raises(FP8MeasurementError, match="1 selected modules were never reached by calibration: unused"):
        convert(model)
    assert type(model.used) is nn.Linear
    assert state_of(model).phase == "measuring"


@pytest.mark.core
def test_modules_never_reached_stay_in_high_precision_if_asked(caplog):
    model = converted(Branches(), torch.ones(1, 4), ignore_modules_wo_measures=True)
    assert isinstance(model.used, FP8Linear) and type(model.unused) is nn.Linear
    assert "unused" in caplog.text
    assert quantization_report(model).modules[1].reason == "never reached by calibration"


def test_a_wrong_pattern_leaves_the_model_alone():
    model = net()
    with pytest.raises(FP8SelectionError):
        prepare(model, FP8Config(blocklist={"names": ["nowhere"]}))
    assert state_of(model) is None
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.core
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_an_error_half_way_leaves_the_model_as_it_was(value):
    model, x = net(), batch()
    prepare(model, FP8Config(**STATIC, measure_exclude="NONE"))
    model(x)
    original = list(model)
    broken = model[5].weight
    good = broken[0, 0].item()
    with torch.no_grad():
        broken[0, 0] = value
    before = model(x * 0.5)
    with pytest.raises(FP8ScaleError, match="^5: the weight holds NaN or Inf"):
        convert(model)
    assert list(model) == original, "the very same modules"
    assert torch.equal(model(x * 0.5), before) or before.isnan().all()
    model(x * 100)
    measurements = state_of(model).measurements
    assert measurements.range("0") == (x * 100).abs().max(), "the observers are still on"
    with torch.no_grad():
        broken[0, 0] = good
    convert(model)
    assert len(fp8_modules(model)) == 3 and model(x).isfinite().all()


def test_an_error_without_prepare_leaves_no_state():
    model = net()
    with torch.no_grad():
        model[3].weight[0, 0] = float("inf")
    with pytest.raises(FP8ScaleError, match="^3: "):
        convert(model, FP8Config(activation_scheme="dynamic"))
    assert state_of(model) is None and not fp8_modules(model)
    with torch.no_grad():
        model[3].weight[0, 0] = 0.0
    convert(model, FP8Config(activation_scheme="dynamic"))


def test_an_error_after_the_swap_leaves_a_transformers_model_as_it_was(monkeypatch):
    def fails(*args, **kwargs):
        raise ValueError("no")

    model = tiny_llama()
    monkeypatch.setattr("optimum_fp8.quantize.attach_quantizer", fails)
    with pytest.raises(ValueError, match="no"):
        convert(model, FP8Config(activation_scheme="dynamic"))
    assert not fp8_modules(model) and state_of(model) is None


@pytest.mark.parametrize("step", [prepare, convert])
def test_a_model_that_is_a_linear_itself(step):
    with pytest.raises(FP8SelectionError, match="nn.Sequential"):
        step(nn.Linear(4, 4), FP8Config(activation_scheme="dynamic"))


def test_inputs_that_were_always_zero_are_named(caplog):
    model = prepare(nn.Sequential(nn.Linear(4, 4)), FP8Config(target="gaudi3"))
    model(torch.zeros(1, 4))
    convert(model)
    assert "zero throughout calibration: ['0']" in caplog.text
