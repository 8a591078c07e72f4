"""Weights that change around calibration: ranges are always of the weights that the measurements say they are of."""

from __future__ import annotations

import copy

import pytest
import torch
from hf.conftest import llama
from torch import nn
from transformers import AutoModelForCausalLM

from optimum_fp8 import FP8Config, calibrate, convert, dequantize, finalize_calibration, prepare
from optimum_fp8.errors import FP8MeasurementError
from optimum_fp8.lifecycle import state_of
from optimum_fp8.measure import Measurements, kept_prefix, model_fingerprint
from optimum_fp8.modules import fp8_modules

X = torch.ones(2, 4)


@pytest.fixture
def config(tmp_path):
    return lambda **options: FP8Config(
        **{"target": "cpu", "activation_scheme": "static", "dump_stats_path": str(tmp_path / "m"), **options}
    )


def net(seed=0, activation=nn.ReLU):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 4), activation(), nn.Linear(4, 4))


def train(model):
    """One step of SGD."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model(X).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def merge(model):
    """What merging an adapter does to one layer."""
    with torch.no_grad():
        model[2].weight += 0.5 * torch.ones(4, 1) @ torch.ones(1, 4)


def load(model):
    model.load_state_dict(net(seed=1).state_dict())


CHANGES = pytest.mark.parametrize("change", [merge, load])


@pytest.mark.core
@CHANGES
def test_weights_changed_before_the_data_count_as_they_are_then(config, change):
    model = prepare(net(), config())
    change(model)
    with torch.no_grad():
        model(X)
    measurements = finalize_calibration(model)
    assert measurements.fingerprint == model_fingerprint(model)
    assert measurements.range("2", "weight") == model[2].weight.abs().max(), "not that of the weight before"
    changed = net()
    change(changed)
    assert torch.equal(convert(changed, config(mode="QUANTIZE"))(X), convert(model)(X))
    with pytest.raises(FP8MeasurementError, match="are of another model"):
        convert(net(), config(mode="QUANTIZE"))


@pytest.mark.core
@CHANGES
@pytest.mark.parametrize("step", [finalize_calibration, convert])
def test_weights_changed_after_the_data_are_refused(config, tmp_path, change, step):
    model = prepare(net(), config())
    model(X)
    change(model)
    with pytest.raises(FP8MeasurementError, match="weights of the model have changed since"):
        step(model)
    assert not list(tmp_path.iterdir()) and not fp8_modules(model)
    dequantize(model)
    prepare(model, config())
    model(X)
    step(model)


@pytest.mark.parametrize("step", [finalize_calibration, convert])
def test_training_while_measuring_is_refused(config, step):
    model = prepare(net(), config())
    train(model)
    with pytest.raises(FP8MeasurementError, match="have changed"):
        step(model)


def test_weights_changed_between_finalizing_and_converting_are_refused(config):
    model = prepare(net(), config())
    model(X)
    finalize_calibration(model)
    merge(model)
    with pytest.raises(FP8MeasurementError, match="have changed"):
        convert(model)


@pytest.mark.core
def test_weights_changed_between_two_calibrations_are_refused_before_the_data(config):
    data = [X]
    model = calibrate(prepare(net(), config(dataset=data)))
    calibrate(model)
    merge(model)
    samples = state_of(model).measurements.samples
    with pytest.raises(FP8MeasurementError, match="have changed"):
        calibrate(model)
    assert state_of(model).measurements.samples == samples


def test_a_loop_that_trains_is_refused(config):
    model = prepare(net(), config(dataset=lambda model: (model(X), merge(model))))
    with pytest.raises(FP8MeasurementError, match="have changed"):
        calibrate(model)


@pytest.mark.parametrize("options", [{"activation_scheme": "dynamic"}, {"activation_scheme": "weight_only"}])
def test_where_no_ranges_are_needed_weights_may_change(config, options):
    model = prepare(net(), config(**options))
    model(X)
    merge(model)
    measurements = finalize_calibration(model)
    assert measurements.fingerprint == model_fingerprint(model)
    assert measurements.range("2", "weight") == model[2].weight.abs().max()
    convert(model)


def test_a_copy_of_a_measured_model_is_told_by_its_own_weights(config):
    model = prepare(net(), config())
    twin = copy.deepcopy(model)
    merge(twin)
    model(X), twin(X)
    assert finalize_calibration(model).fingerprint == model_fingerprint(model) != model_fingerprint(twin)
    convert(twin)


def test_casting_to_bfloat16_is_no_change(config):
    model = prepare(net().bfloat16().float(), config())
    model(X)
    convert(model.bfloat16())


def test_weights_that_are_fp8_already_and_what_is_around_them(save, ids, tmp_path):
    path, prefix = save(llama()), str(tmp_path / "m")
    options = {"activation_scheme": "static", "dump_stats_path": prefix}
    model = AutoModelForCausalLM.from_pretrained(path, quantization_config=FP8Config(**options))
    with torch.no_grad():
        model(ids)
        model.model.norm.weight += 1.0
        with pytest.raises(FP8MeasurementError, match="have changed"):
            convert(model)
        model.model.norm.weight -= 1.0
    finalize_calibration(model)
    assert Measurements.load(prefix).fingerprint == model_fingerprint(AutoModelForCausalLM.from_pretrained(path))
    convert(model)


# --- files of other models ------------------------------------------------------------------------------------------


@pytest.mark.core
def test_each_model_finds_its_own_ranges_at_a_path_that_many_share(config, caplog):
    for seed in (0, 1):
        model = prepare(net(seed), config())
        model((1 + seed) * X)
        finalize_calibration(model)
    prefix = config().dump_stats_path
    assert f"{kept_prefix(prefix, model_fingerprint(net(0)))}_measurements.safetensors" in caplog.text
    for seed, mode in [(0, "QUANTIZE"), (1, "QUANTIZE"), (0, "AUTO"), (1, "AUTO")]:
        model = convert(net(seed), config(mode=mode))
        assert state_of(model).measurements.range("0") == 1 + seed


def test_ranges_of_the_same_weights_with_another_activation_function_are_refused(config):
    model = prepare(net(), config())
    model(X)
    finalize_calibration(model)
    with pytest.raises(FP8MeasurementError, match="another model .1 is ReLU, not Sigmoid"):
        convert(net(activation=nn.Sigmoid), config(mode="QUANTIZE"))
