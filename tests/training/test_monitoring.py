"""What FP8 loses, as a Trainer logs it: rates that casts of another library have, under names that stay."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest
import torch
from training_runs import Spy, Stop, hooked, llama, logged, same, trainer, weights
from transformers import TrainerCallback

from optimum_fp8 import FP8Callback, FP8Config, calibrate, convert, prepare
from optimum_fp8.errors import FP8ConfigError
from optimum_fp8.formats import number_format
from optimum_fp8.scales import activation_scale
from optimum_fp8.training.monitoring import spread
from optimum_fp8.training.rates import lost

DTYPES = {"E4M3": ml_dtypes.float8_e4m3fn, "E5M2": ml_dtypes.float8_e5m2}


@pytest.mark.parametrize("fp8_config, target", [("E4M3", "cpu"), ("E4M3", "gaudi2"), ("E5M2", "cuda")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rates_are_those_of_a_cast(fp8_config, target, dtype):
    fmt = number_format(fp8_config, target)
    x = (torch.randn(64, 32) * torch.logspace(-7, 5, 32)).to(dtype)
    x[0], scale = 0, torch.tensor([0.25])
    cast = (x.float().numpy() / 0.25).astype(DTYPES[fp8_config]).astype(np.float32)
    saturated = int((np.abs(x.float().numpy() / 0.25) > fmt.full_scale).sum())
    vanished = int(((cast == 0) & (x.float().numpy() != 0)).sum())
    assert lost(x, scale, fmt).tolist() == [saturated, vanished] and saturated and vanished


@pytest.mark.parametrize("shape", [(1,), (4, 1), (4, 2)])
def test_scales_of_any_granularity(shape):
    x, scale = torch.randn(4, 8), torch.rand(shape) * 1e-3 + 1e-4
    whole = scale.expand(4, shape[-1]).repeat_interleave(8 // shape[-1], 1) if len(shape) > 1 else scale.expand(4, 8)
    expected = int(((x / whole).abs() > 448).sum())
    assert int(lost(x, spread(scale, x), number_format())[0]) == expected > 0


def test_training_is_monitored_and_not_disturbed(tmp_path):
    expected = llama()
    trainer(expected, tmp_path / "plain").train()
    model, callback = llama(), FP8Callback(FP8Config(), purpose="monitor", every=2)
    run = trainer(model, tmp_path / "run", callback)
    run.train()
    assert same(weights(model), weights(expected)) and hooked(model) == []
    entries = list(logged(run, "fp8/"))
    assert [entry["step"] for entry in entries] == [1, 2, 4]
    name = "model.layers.1.mlp.down_proj"
    names = {f"fp8/{kind}/{name}" for kind in ("drift", "saturation", "underflow")}
    assert all(names <= entry.keys() and "fp8/saturation_max" in entry for entry in entries)
    assert len(list(logged(run, "loss"))) == 4  # logged by the Trainer itself in the same steps
    assert callback.rates["drift"][name] == entries[-1][f"fp8/drift/{name}"] and "drift: " in callback.summary


def test_values_follow_from_the_ranges_of_the_first_step(tmp_path):
    largest = []
    for steps in (1, 4):
        model = llama()
        spy = Spy(model, training=True)
        trainer(model, tmp_path / "plain", Stop(steps), Forget(spy), learning_rate=1.0).train()
        largest.append(spy.largest)
    callback = FP8Callback(FP8Config(), purpose="monitor", every=1)
    trainer(llama(), tmp_path / "run", callback, learning_rate=1.0).train()
    beyond = 0
    for name, drift in callback.rates["drift"].items():
        first, last = largest[0][name], largest[1][name]
        assert drift == pytest.approx(math.log2(last / first), abs=1e-6)
        scale = float(activation_scale(first, method="maxabs_hw"))
        assert (callback.rates["saturation"][name] > 0) == (last > scale * 448)
        beyond += last > scale * 448
    assert beyond


class Forget(TrainerCallback):
    """Has a spy see each step anew."""

    def __init__(self, spy):
        self.spy = spy

    def on_step_begin(self, args, state, control, **kwargs):
        self.spy.largest.clear()


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["static", "dynamic", "weight_only"])
def test_an_fp8_model_has_its_own_scales(tmp_path, scheme):
    config = FP8Config(activation_scheme=scheme, scale_method="maxabs_pow2")
    model = prepare(llama().eval(), config.replace(dataset=None))
    if scheme == "static":
        calibrate(model, config.replace(dataset=[{"input_ids": torch.arange(8)[None]}]))
    convert(model)
    layer = model.model.layers[0].mlp.down_proj
    if scheme == "static":
        layer.input_scale.data /= 64  # so that something saturates
    callback = FP8Callback(purpose="monitor")
    run = trainer(model, tmp_path / "run", callback)
    run.evaluate()
    rates, name = callback.rates, "model.layers.0.mlp.down_proj"
    assert rates["drift"][name] == 0 and (name in rates["saturation"]) == (scheme != "weight_only")
    if scheme != "weight_only":
        assert (rates["saturation"][name] > 0) == (scheme == "static")
    # Where it waits for the next evaluation; both models also have a hook that refuses to train them as a whole.
    assert hooked(model) == ["", "model"]
    assert list(logged(run, "fp8/drift"))


@pytest.mark.slow
def test_resumed_training_keeps_its_first_step(tmp_path):
    saved = {"save_strategy": "steps", "save_steps": 2}
    whole = FP8Callback(FP8Config(), purpose="monitor", every=1)
    trainer(llama(), tmp_path / "whole", whole).train()
    trainer(llama(), tmp_path / "run", FP8Callback(FP8Config(), purpose="monitor", every=1), Stop(2), **saved).train()
    resumed = FP8Callback(FP8Config(), purpose="monitor", every=1)
    trainer(llama(), tmp_path / "run", resumed, **saved).train(resume_from_checkpoint=True)
    assert resumed.rates == whole.rates and any(resumed.rates["drift"].values())


@pytest.mark.core
def test_tensorboard_has_the_values(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    callback = FP8Callback(FP8Config(), purpose="monitor", every=2)
    run = trainer(llama(), tmp_path / "run", callback, report_to=["tensorboard"])
    run.train()
    (folder,) = (tmp_path / "run" / "runs").iterdir()
    found = EventAccumulator(str(folder)).Reload()
    name = "model.layers.0.mlp.down_proj"
    scalars = found.Scalars(f"train/fp8/drift/{name}")
    assert [each.step for each in scalars] == [1, 2, 4]
    assert scalars[-1].value == pytest.approx(callback.rates["drift"][name], rel=1e-6)


def test_a_model_in_high_precision_needs_a_config(tmp_path):
    with pytest.raises(FP8ConfigError, match="purpose='monitor' of a model in high precision needs a config"):
        trainer(llama(), tmp_path / "run", FP8Callback(purpose="monitor")).train()
