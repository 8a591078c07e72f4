"""Measuring: what is observed, that it changes nothing, and how it ends."""

from __future__ import annotations

import pytest
import torch
from tiny_models import tiny_llama
from torch import nn

from optimum_fp8 import FP8Config, convert, finalize_calibration, prepare, quantization_report
from optimum_fp8.attention import plan_of
from optimum_fp8.errors import FP8MeasurementError, FP8StateError
from optimum_fp8.lifecycle import needs_ranges, state_of
from optimum_fp8.lifecycle.prepare import fingerprint, saw_activations, unmeasured_state
from optimum_fp8.measure import Measurements

IDS = torch.arange(3, 12)[None]


@pytest.fixture
def config(tmp_path):
    return lambda **options: FP8Config(
        **{"target": "cpu", "activation_scheme": "static", "dump_stats_path": str(tmp_path / "m"), **options}
    )


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))


@pytest.mark.core
def test_what_needs_no_ranges_is_not_observed():
    overrides = {"^0$": {"activation_scheme": "weight_only"}}
    model = prepare(net(), FP8Config(activation_scheme="static", overrides=overrides))
    assert [len(module._forward_pre_hooks) for module in model] == [0, 1]
    model(torch.ones(1, 4))
    measured = state_of(model).measurements
    assert measured.range("0") is None and measured.range("1") is not None
    convert(model)
    assert [module.activations for module in model] == ["weight_only", "static"]


@pytest.mark.core
@pytest.mark.parametrize("options", [{}, {"attention": True}, {"attention": True, "kv_cache": True}], ids=str)
def test_measuring_changes_no_weight_and_ends_without_a_trace(config, options):
    model = tiny_llama()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    with torch.no_grad():
        expected = model(IDS).logits
        prepare(model, config(**options))
        torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-5, atol=1e-5)
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    assert quantization_report(model).phase == "measuring"
    finalize_calibration(model)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    assert not any(plan_of(module) for module in model.modules())
    convert(model)


def test_only_the_attention_that_is_asked_for_is_observed():
    overrides = {"self_attn$": {"attention": True}}
    model = prepare(tiny_llama(), FP8Config(activation_scheme="static", overrides=overrides))
    assert plan_of(model.model.layers[0].self_attn) is not None
    model = prepare(tiny_llama(), FP8Config(activation_scheme="static"))
    assert plan_of(model.model.layers[0].self_attn) is None


@pytest.mark.parametrize(
    "scheme, needed", [("static", True), ("dynamic", False), ("weight_only", False), ("auto", True)]
)
def test_needs_ranges(scheme, needed):
    assert needs_ranges(state_of(prepare(net(), FP8Config(activation_scheme=scheme)))) is needed


def test_one_module_that_needs_ranges_is_enough():
    config = FP8Config(activation_scheme="dynamic", overrides={"^1$": {"activation_scheme": "static"}})
    assert needs_ranges(state_of(prepare(net(), config)))


def test_weights_alone_are_no_data():
    measurements = Measurements("")
    measurements.observe("0", "weight", torch.ones(2, 2))
    assert not saw_activations(measurements)
    measurements.observe("0", "input", torch.ones(2))
    assert saw_activations(measurements)


def test_finalizing_twice_writes_the_same_file(config):
    model = prepare(net(), config())
    model(torch.ones(1, 4))
    first = finalize_calibration(model)
    assert finalize_calibration(model) is first
    assert Measurements.load(config().dump_stats_path).range("0") == 1.0


@pytest.mark.core
def test_the_fingerprint_is_of_the_weights():
    model = net()
    before = fingerprint(model)
    assert fingerprint(net()) == before and fingerprint(prepare(net(), FP8Config())) == before
    with torch.no_grad():
        model[1].weight[0, 0] += 1
    assert fingerprint(model) != before
    with pytest.raises(FP8StateError, match=r"the weights of 2 modules \(0, 1, …\) are offloaded or not loaded"):
        fingerprint(net().to("meta"))


def test_the_state_of_a_model_that_was_not_prepared_finds_the_file(config):
    model = prepare(net(), config())
    model(torch.full((1, 4), 3.0))
    finalize_calibration(model)
    assert unmeasured_state(net(), config()).measurements.range("0") == 3.0
    assert not unmeasured_state(net(), config(activation_scheme="dynamic")).measurements.tensors
    with pytest.raises(FP8MeasurementError, match="are of another model"):
        unmeasured_state(nn.Sequential(nn.Linear(4, 4)), config())


def test_an_observer_reads_what_another_has_measured_if_its_statistics_are_there(config):
    model = prepare(net(), config(observer="percentile"))
    model(torch.cat([torch.full((500, 4), 0.5), torch.full((1, 4), 8.0)]))
    finalize_calibration(model)
    found = {
        (observer, percentile): unmeasured_state(net(), config(observer=observer, percentile=percentile)).measurements
        for observer in ("percentile", "maxabs", "mse", "entropy")
        for percentile in (90.0, 100.0)
    }
    assert {key: each.range("0").item() for key, each in found.items()} == {
        (observer, percentile): 0.53125 if (observer, percentile) == ("percentile", 90.0) else 8.0
        for observer, percentile in found
    }, "0.53125 is the end of the bin that 0.5 is in"


@pytest.mark.parametrize("observer, lacking", [("mse", "counts"), ("maxabs_per_channel", "maxabs_per_channel")])
def test_measurements_without_the_statistics_that_an_observer_needs_are_refused(config, observer, lacking):
    model = prepare(net(), config())
    model(torch.ones(1, 4))
    finalize_calibration(model)
    message = f"'maxabs', which keeps no {lacking}, but observer='{observer}' needs that: set observer='maxabs', or"
    with pytest.raises(FP8MeasurementError, match=message):
        convert(net(), config(observer=observer))
