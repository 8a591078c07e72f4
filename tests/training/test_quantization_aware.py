"""Quantization-aware training by a Trainer: checkpoints hold what it remembers, and it ends in FP8."""

from __future__ import annotations

import pytest
import torch
from grids import slow_but
from training_runs import Stop, llama, rows, same, trainer, weights
from transformers import AutoModelForCausalLM

from optimum_fp8 import FP8Callback, FP8Config, convert, prepare
from optimum_fp8.errors import FP8StateError
from optimum_fp8.lifecycle import Phase, state_of
from optimum_fp8.modules import fp8_modules


@pytest.fixture
def config(tmp_path) -> FP8Config:
    path = str(tmp_path / "ranges" / "run")
    return FP8Config(fake_quant=True, amax_history_len=3, activation_scheme="static", dump_stats_path=path)


def test_it_is_what_prepare_train_and_convert_give(config, tmp_path):
    expected = prepare(llama(), config)
    trainer(expected, tmp_path / "by_hand").train()
    in_training = weights(expected)
    convert(expected)
    model, callback = llama(), FP8Callback(config, purpose="qat")
    run = trainer(model, tmp_path / "run", callback)
    run.train()
    assert same(weights(AutoModelForCausalLM.from_pretrained(callback.saved_to)), weights(expected))
    assert same(weights(model), in_training) and state_of(model).phase is Phase.TRAINING
    found = callback.metrics["fp8"]["eval_fp8_loss"]
    assert found == trainer(expected, tmp_path / "by_hand").evaluate()["eval_loss"]
    assert f"in training, {found:.6g} in FP8" in callback.summary
    before = weights(model)
    run.train()  # goes on
    assert not same(before, weights(model))


@pytest.mark.parametrize("frozen", slow_but([None, 3], 3))
def test_resumed_training_is_the_same_as_one_without_interruption(config, tmp_path, frozen):
    config = config.replace(freeze_scales_at=frozen)
    saved = {"save_strategy": "steps", "save_steps": 2, "max_steps": 6}
    whole, model = FP8Callback(config, purpose="qat", evaluate=False), llama()
    trainer(model, tmp_path / "whole", whole, **saved).train()
    run = trainer(llama(), tmp_path / "run", FP8Callback(config, purpose="qat", evaluate=False), Stop(2), **saved)
    run.train()
    resumed, again = FP8Callback(config, purpose="qat", evaluate=False), llama()
    trainer(again, tmp_path / "run", resumed, **saved).train(resume_from_checkpoint=True)
    assert same(weights(again), weights(model))
    one, other = (weights(AutoModelForCausalLM.from_pretrained(each.saved_to)) for each in (whole, resumed))
    assert same(one, other)


@pytest.mark.slow
def test_accumulated_gradients_are_one_step(config, tmp_path):
    model = llama()
    options = {"gradient_accumulation_steps": 2, "gradient_checkpointing": True, "max_steps": 3}
    callback = FP8Callback(config, purpose="qat", evaluate=False)
    trainer(model, tmp_path / "run", callback, **options).train()
    steps = {int(value) for name, value in weights(model).items() if "fake_quant" in name and name.endswith("step")}
    expected = prepare(llama(), config)
    trainer(expected, tmp_path / "by_hand", **options).train()
    assert same(weights(model), weights(expected)) and steps <= {3}


def test_the_purpose_asks_for_it_by_itself(tmp_path):
    model = llama()
    trainer(model, tmp_path / "run", FP8Callback(FP8Config(), purpose="qat"))
    assert state_of(model).phase is Phase.TRAINING and state_of(model).config.fake_quant


def test_it_can_be_monitored(config, tmp_path):
    model, monitor = llama(), FP8Callback(purpose="monitor", every=2)
    run = trainer(model, tmp_path / "run", FP8Callback(config, purpose="qat", evaluate=False), monitor)
    run.train()
    assert len(monitor.rates["drift"]) == 14 and monitor.rates["saturation"].keys() == monitor.rates["drift"].keys()


@pytest.mark.slow
def test_a_callback_that_comes_too_late_to_resume(config, tmp_path):
    saved = {"save_strategy": "steps", "save_steps": 2}
    trainer(llama(), tmp_path / "run", FP8Callback(config, purpose="qat", evaluate=False), **saved).train()
    run = trainer(llama(), tmp_path / "run", max_steps=6)
    run.add_callback(FP8Callback(config, purpose="qat"))
    with pytest.raises(FP8StateError, match="was loaded from a checkpoint.*before it was prepared: pass the callback"):
        run.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))


@pytest.mark.slow
def test_a_model_that_was_loaded_for_it(config, tmp_path):
    llama().save_pretrained(tmp_path / "plain")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", quantization_config=config)
    callback = FP8Callback(config, purpose="qat")
    run = trainer(model, tmp_path / "run", callback)
    run.train()
    found = AutoModelForCausalLM.from_pretrained(callback.saved_to)
    assert len(fp8_modules(found)) == 14
    batch = {key: value[None] for key, value in rows(1, seed=9)[0].items() if key != "labels"}
    with torch.no_grad():
        assert torch.equal(found(**batch).logits, convert(model.eval())(**batch).logits)
