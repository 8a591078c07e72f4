"""Ranges that are measured while a Trainer trains or evaluates: those that a hook of one's own sees, and no change."""

from __future__ import annotations

import pytest
import torch
from grids import slow_but
from training_runs import Spy, Stop, hooked, llama, rows, same, trainer, weights
from transformers import AutoModelForCausalLM

from optimum_fp8 import FP8Callback, FP8Config, Measurements, finalize_calibration, prepare
from optimum_fp8.errors import FP8ConfigError, FP8MeasurementError, FP8NotAvailableError, FP8StateError
from optimum_fp8.lifecycle import state_of
from optimum_fp8.scales import activation_scale

WAYS = {
    "plain": {},
    "checkpointing": {"gradient_checkpointing": True},
    "reentrant": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
    "accumulation": {"gradient_accumulation_steps": 2},
    "evaluations": {"eval_strategy": "steps", "eval_steps": 2},
    "autocast": {"bf16": True},
}


@pytest.fixture
def config(tmp_path) -> FP8Config:
    return FP8Config(dump_stats_path=str(tmp_path / "ranges" / "run"))


@pytest.mark.parametrize("way", slow_but(WAYS, "checkpointing", "accumulation"))
def test_training_is_measured_and_not_disturbed(config, tmp_path, way):
    expected = llama()
    spy = Spy(expected, training=True)
    options = {key: value for key, value in WAYS[way].items() if "checkpointing" not in key}  # the same numbers
    trainer(expected, tmp_path / "expected", **options).train()

    model, callback = llama(), FP8Callback(config)
    run = trainer(model, tmp_path / "measured", callback, **WAYS[way])
    run.train()
    assert same(weights(model), weights(expected))
    assert state_of(model) is None
    assert not [name for name in hooked(model) if name != "model.embed_tokens"]  # checkpointing's own
    measured = callback.measurements
    ranges = {name: float(measured.range(name)) for name, kind in measured.tensors if kind == "input"}
    assert ranges == {name: value for name, value in spy.largest.items() if name != "lm_head"} and len(ranges) == 14
    assert measured.samples == 4 * 2 * WAYS[way].get("gradient_accumulation_steps", 1)


def test_what_was_measured_quantizes_the_model_that_training_ended_with(config, tmp_path):
    callback = FP8Callback(config)
    run = trainer(llama(), tmp_path / "run", callback)
    run.train()
    run.save_model()
    stored = config.replace(mode="QUANTIZE")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run", quantization_config=stored)
    up, range_ = model.model.layers[1].mlp.up_proj, callback.measurements.range("model.layers.1.mlp.up_proj")
    assert torch.equal(up.input_scale, activation_scale(range_, method=config.scale_method).reshape(1))
    assert str(config.dump_stats_path) in callback.summary


def test_evaluation_without_training(config, tmp_path):
    model, callback = llama(), FP8Callback(config)
    run = trainer(model, tmp_path / "run", callback, per_device_eval_batch_size=4)
    plain = trainer(llama(), tmp_path / "plain", per_device_eval_batch_size=4).evaluate()["eval_loss"]
    assert run.evaluate()["eval_loss"] == plain
    spied = llama()
    spy = Spy(spied, training=False)
    trainer(spied, tmp_path / "plain", per_device_eval_batch_size=4).evaluate()
    assert callback.measurements.range("model.layers.0.mlp.down_proj") == spy.largest["model.layers.0.mlp.down_proj"]
    assert callback.measurements.samples == Measurements.load(config.dump_stats_path).samples == 6
    assert state_of(model) is None and hooked(model) == [""]  # where it waits for the next evaluation
    run.predict(rows(2, seed=3))
    assert callback.measurements.samples == 8


def test_by_hand_it_is_the_same(config, tmp_path):
    callback = FP8Callback(config)
    run = trainer(llama(), tmp_path / "run", callback, per_device_eval_batch_size=6)
    run.evaluate()
    model = prepare(llama().eval(), config)
    batch = {key: torch.stack([row[key] for row in rows(6, seed=2)]) for key in ("input_ids", "attention_mask")}
    state = state_of(model)
    with torch.no_grad(), state.observers.only_where(batch["attention_mask"]):
        model(**batch)
    by_hand = finalize_calibration(model)
    assert by_hand.fingerprint == callback.measurements.fingerprint
    assert by_hand.tensors.keys() == callback.measurements.tensors.keys()
    assert all(each.agrees(callback.measurements.tensors[place]) for place, each in by_hand.tensors.items())


@pytest.mark.slow
def test_what_was_measured_of_other_weights_does_not_count(config, tmp_path):
    model, callback = llama(), FP8Callback(config)
    run = trainer(model, tmp_path / "run", callback)
    run.evaluate()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(2)
    run.evaluate()
    assert callback.measurements.samples == 6


@pytest.mark.slow
def test_evaluations_in_the_course_of_training(config, tmp_path):
    spied = llama()
    trainer(spied, tmp_path / "plain").train()
    spy = Spy(spied, training=False)
    trainer(spied, tmp_path / "plain").evaluate()
    callback = FP8Callback(config, during="evaluation")
    run = trainer(llama(), tmp_path / "run", callback, eval_strategy="steps", eval_steps=2)
    run.train()  # the last evaluation is of the weights at the end
    measured = callback.measurements
    assert {name: float(measured.range(name)) for name in spy.largest if name != "lm_head"} == {
        name: value for name, value in spy.largest.items() if name != "lm_head"
    }
    assert measured.samples == 6


@pytest.mark.slow
def test_every_other_step(config, tmp_path):
    callback = FP8Callback(config, every=2)
    trainer(llama(), tmp_path / "run", callback).train()
    assert callback.measurements.samples == 4


@pytest.mark.core
def test_resumed_training_has_the_ranges_of_one_without_interruption(config, tmp_path):
    whole = FP8Callback(config.replace(observer="percentile"))
    trainer(llama(), tmp_path / "whole", whole).train()

    saved = {"save_strategy": "steps", "save_steps": 2}
    stopped = FP8Callback(config.replace(observer="percentile"))
    run = trainer(llama(), tmp_path / "run", stopped, **saved)
    run.add_callback(Stop(2))
    run.train()
    resumed = FP8Callback(config.replace(observer="percentile"))
    model = llama()
    run = trainer(model, tmp_path / "run", resumed, **saved)
    run.train(resume_from_checkpoint=True)
    assert run.state.global_step == 4 and stopped.measurements.samples == 4
    assert resumed.measurements.samples == 8 and resumed.measurements.fingerprint == whole.measurements.fingerprint
    assert resumed.measurements.encoded() == whole.measurements.encoded()


def test_another_observer_cannot_go_on(config, tmp_path):
    saved = {"save_strategy": "steps", "save_steps": 2}
    trainer(llama(), tmp_path / "run", FP8Callback(config), **saved).train()
    run = trainer(llama(), tmp_path / "run", FP8Callback(config.replace(observer="mse")), max_steps=6)
    with pytest.raises(FP8MeasurementError, match="holds ranges of observer='maxabs', the config says 'mse'"):
        run.train(resume_from_checkpoint=True)
    assert state_of(run.model) is None and hooked(run.model) == []


def test_the_best_model_has_the_ranges_of_its_checkpoint(config, tmp_path):
    best = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    best |= {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "learning_rate": 1.0}
    callback = FP8Callback(config)
    model = llama()
    run = trainer(model, tmp_path / "run", callback, **best)
    run.train()
    assert run.state.best_global_step == 1 < run.state.global_step == 4
    until_then = FP8Callback(config)
    expected = llama()
    run = trainer(expected, tmp_path / "best", until_then, learning_rate=1.0)
    run.add_callback(Stop(1))
    run.train()
    assert same(weights(model), weights(expected))
    assert callback.measurements.encoded() == until_then.measurements.encoded()


@pytest.mark.parametrize(
    "changes, options, error, message",
    [
        ({"activation_scheme": "dynamic"}, {}, FP8ConfigError, "no scale would follow from a range"),
        ({"measure_exclude": "INPUT"}, {}, FP8ConfigError, "measure_exclude='INPUT' leaves nothing"),
        ({"attention": True}, {}, FP8NotAvailableError, "attention=True changes how a model computes"),
        ({"allowlist": {"names": ["nonsense"]}}, {}, ValueError, "nonsense"),
        ({}, {"torch_compile": True}, FP8NotAvailableError, "torch_compile=True"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_the_first_step(config, tmp_path, changes, options, error, message):
    model = llama()
    run = trainer(model, tmp_path / "run", FP8Callback(config.replace(**changes)), **options)
    with pytest.raises(error, match=message):
        run.train()
    assert run.state.global_step == 0 and state_of(model) is None and hooked(model) == []


def test_a_place_that_cannot_be_written(config, tmp_path):
    (tmp_path / "ranges").write_text("a file")
    with pytest.raises(FP8ConfigError, match="is not a folder"):
        trainer(llama(), tmp_path / "run", FP8Callback(config)).train()


def test_evaluation_data_that_are_not_there(config, tmp_path):
    run = trainer(llama(), tmp_path / "run", FP8Callback(config, during="evaluation"))
    run.eval_dataset = None
    with pytest.raises(FP8ConfigError, match="during='evaluation', and the Trainer has no eval_dataset"):
        run.train()


def test_a_callback_that_comes_too_late(config, tmp_path):
    run = trainer(llama(), tmp_path / "run")
    run.add_callback(FP8Callback(config))
    with pytest.raises(FP8StateError, match="came too late to measure this evaluation: pass it when the Trainer"):
        run.evaluate()


def test_a_model_that_is_measured_already(config, tmp_path):
    model = prepare(llama(), config)
    with pytest.raises(FP8StateError, match="prepared already"):
        trainer(model, tmp_path / "run", FP8Callback(config)).train()
    assert state_of(model) is not None
