"""Trainings that end in FP8: what they end with is what conversion by hand gives, and the trained model is kept."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import nn
from training_runs import Stop, arguments, hooked, llama, logged, rows, same, trainer, weights
from transformers import AutoModelForCausalLM, EarlyStoppingCallback, Trainer

from optimum_fp8 import FP8Callback, FP8Config, calibrate, convert, load, prepare
from optimum_fp8.errors import FP8CalibrationError, FP8ConfigError, FP8NotAvailableError, FP8SelectionError
from optimum_fp8.lifecycle import state_of
from optimum_fp8.modules import fp8_modules
from optimum_fp8.training import outcome


@pytest.fixture
def config(tmp_path) -> FP8Config:
    return FP8Config(dump_stats_path=str(tmp_path / "ranges" / "run"))


def trained(folder, **options) -> tuple[nn.Module, Trainer]:
    """A model that was trained without any of ours."""
    model = llama()
    run = trainer(model, folder, **options)
    run.train()
    return model, run


def by_hand(model: nn.Module, config: FP8Config) -> dict[str, torch.Tensor]:
    prepare(model, config)
    return weights(convert(model if config.dataset is None else calibrate(model)))


@pytest.mark.core
def test_a_training_ends_with_both_models(config, tmp_path):
    expected, plain = trained(tmp_path / "plain")
    metrics = plain.evaluate()
    model, callback = llama(), FP8Callback(config, purpose="quantize")
    attributes = vars(model).keys() | {"_is_accelerate_prepared"}
    run = trainer(model, tmp_path / "run", callback)
    run.train()

    assert same(weights(model), weights(expected)) and not fp8_modules(model)
    assert state_of(model) is None and hooked(model) == []
    assert not any(vars(model)[name] for name in vars(model).keys() - attributes)
    assert not hasattr(model.config, "quantization_config")
    assert all(parameter.requires_grad for parameter in model.parameters())
    kept = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    assert same(weights(kept), weights(expected))

    reloaded = AutoModelForCausalLM.from_pretrained(callback.saved_to)
    assert callback.saved_to == str(tmp_path / "run" / "fp8") and len(fp8_modules(reloaded)) == 14
    assert reloaded.model.layers[0].mlp.up_proj.activations == "static"
    of_reloaded = trainer(reloaded, tmp_path / "reloaded").evaluate()
    assert callback.metrics["full"]["eval_loss"] == metrics["eval_loss"]
    assert callback.metrics["fp8"]["eval_fp8_loss"] == of_reloaded["eval_loss"] != metrics["eval_loss"]
    (entry,) = logged(run, "eval_fp8_loss")
    assert entry["eval_fp8_loss"] == of_reloaded["eval_loss"] and entry["step"] == 4
    assert (
        f"eval_loss: {metrics['eval_loss']:.6g} in high precision, {of_reloaded['eval_loss']:.6g}" in callback.summary
    )


@pytest.mark.slow
def test_training_can_go_on_afterwards(config, tmp_path):
    expected, plain = trained(tmp_path / "plain")
    plain.train()
    model, callback = llama(), FP8Callback(config, purpose="quantize", evaluate=False)
    run = trainer(model, tmp_path / "run", callback)
    run.train()
    assert callback.metrics == {}
    run.train()  # the FP8 checkpoint of before is replaced
    assert same(weights(model), weights(expected))
    weight = AutoModelForCausalLM.from_pretrained(callback.saved_to).model.layers[0].mlp.up_proj.weight
    torch.testing.assert_close(weight.float(), model.model.layers[0].mlp.up_proj.weight.detach(), rtol=0.07, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["dynamic", "weight_only", "static"])
def test_it_is_what_conversion_by_hand_gives(config, tmp_path, scheme):
    batches = [{"input_ids": row["input_ids"][None]} for row in rows(3, seed=5)] if scheme == "static" else None
    config = config.replace(activation_scheme=scheme, scale_method="maxabs_pow2", dataset=batches)
    expected = by_hand(trained(tmp_path / "plain")[0], config)
    callback = FP8Callback(config, purpose="quantize", save_to=tmp_path / "elsewhere", evaluate=False)
    trainer(llama(), tmp_path / "run", callback).train()
    assert same(weights(AutoModelForCausalLM.from_pretrained(tmp_path / "elsewhere")), expected)


@pytest.mark.slow
def test_attention_takes_a_dataset(config, tmp_path):
    batches = [{"input_ids": row["input_ids"][None]} for row in rows(3, seed=5)]
    config = config.replace(attention=True, kv_cache=True, decode_steps=2, dataset=batches)
    expected = by_hand(trained(tmp_path / "plain")[0], config)
    callback = FP8Callback(config, purpose="quantize", evaluate=False)
    model = llama()
    implementation = model.config._attn_implementation
    trainer(model, tmp_path / "run", callback).train()
    assert same(weights(AutoModelForCausalLM.from_pretrained(callback.saved_to)), expected)
    assert model.config._attn_implementation == implementation


def test_the_best_model_is_converted(config, tmp_path):
    best = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "max_steps": 6}
    best |= {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "learning_rate": 1.0}
    callback = FP8Callback(config, purpose="quantize")
    model = llama()
    run = trainer(model, tmp_path / "run", callback, EarlyStoppingCallback(early_stopping_patience=2), **best)
    run.train()
    assert run.state.best_global_step == 1 and run.state.global_step == 3  # stopped early
    kept = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "checkpoint-1")
    assert same(weights(model), weights(kept))
    assert callback.metrics["full"]["eval_loss"] == pytest.approx(run.state.best_metric)
    expected = weights(convert(kept, config.replace(activation_scheme="dynamic")))
    found = weights(AutoModelForCausalLM.from_pretrained(callback.saved_to))
    codes = [name for name, tensor in expected.items() if tensor.dtype.itemsize == 1]
    assert codes and all(torch.equal(found[name].view(torch.uint8), expected[name].view(torch.uint8)) for name in codes)
    state = json.loads((tmp_path / "run" / "checkpoint-1" / "trainer_state.json").read_text())
    assert state["stateful_callbacks"]["optimum_fp8.quantize"]["now"][0] == 1


@pytest.mark.slow
def test_resumed_training_ends_with_the_same_fp8_model(config, tmp_path):
    whole = FP8Callback(config, purpose="quantize", evaluate=False)
    trainer(llama(), tmp_path / "whole", whole).train()
    saved = {"save_strategy": "steps", "save_steps": 2}
    run = trainer(llama(), tmp_path / "run", FP8Callback(config, purpose="quantize", evaluate=False), **saved)
    run.add_callback(Stop(2))
    run.train()
    resumed = FP8Callback(config, purpose="quantize", evaluate=False)
    trainer(llama(), tmp_path / "run", resumed, **saved).train(resume_from_checkpoint=True)
    one, other = (AutoModelForCausalLM.from_pretrained(each.saved_to) for each in (whole, resumed))
    assert same(weights(one), weights(other))


class Net(nn.Module):
    """No model of transformers."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))

    def forward(self, x, labels):
        logits = self.layers(x)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def test_any_module_and_metrics_of_ones_own(config, tmp_path):
    torch.manual_seed(0)
    data = [{"x": torch.randn(8), "labels": torch.tensor(number % 4)} for number in range(8)]

    def accuracy(predictions):
        return {"accuracy": float((predictions.predictions.argmax(-1) == predictions.label_ids).mean())}

    model = Net()
    sets = {"seen": data, "few": data[:3]}
    callback = FP8Callback(config, purpose="quantize")
    options = {"compute_metrics": accuracy, "train_dataset": data, "eval_dataset": sets, "callbacks": [callback]}
    Trainer(model, arguments(tmp_path / "run", label_names=["labels"]), **options).train()
    assert 0 <= callback.metrics["fp8"]["eval_fp8_few_accuracy"] <= 1 and "eval_seen_accuracy" in callback.summary
    found = load(callback.saved_to, Net())
    expected = callback.metrics["fp8"]["eval_fp8_seen_loss"]
    run = Trainer(found, arguments(tmp_path / "run", label_names=["labels"]), eval_dataset=data)
    assert run.evaluate()["eval_loss"] == expected and math.isfinite(expected)


# --- what goes wrong ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"mode": "MEASURE"}, FP8NotAvailableError, "mode='MEASURE' only measures: use purpose='measure'"),
        ({"allowlist": {"names": ["nonsense"]}}, FP8SelectionError, "nonsense"),
        ({"dataset": "nowhere.txt"}, FP8CalibrationError, "nowhere.txt"),
        ({"dataset": []}, FP8CalibrationError, "empty"),
        ({"measure_exclude": "ALL", "activation_scheme": "static"}, FP8ConfigError, "measure_exclude"),
        ({"kv_cache": True}, FP8NotAvailableError, "kv_cache=True changes how .* give the config a `dataset`"),
    ],
)
def test_what_would_fail_at_the_end_is_refused_at_the_beginning(config, tmp_path, changes, error, message):
    model = llama()
    run = None
    with pytest.raises(error, match=message):
        run = trainer(model, tmp_path / "run", FP8Callback(config.replace(**changes), purpose="quantize"))
        run.train()
    assert (run is None or run.state.global_step == 0) and state_of(model) is None and hooked(model) == []


def test_folders_that_cannot_take_the_model(config, tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("of another kind")
    for folder, message in (
        ("file/fp8", "the models cannot be saved: .*file' is not a folder"),
        ("other", "holds something other than an FP8 checkpoint, which would be overwritten"),
        ("run", "is the folder of the trained model itself"),
    ):
        callback = FP8Callback(config, purpose="quantize", save_to=tmp_path / folder)
        with pytest.raises(FP8ConfigError, match=message):
            trainer(llama(), tmp_path / "run", callback).train()


def test_a_model_in_fp8_cannot_be_trained_to_end_in_fp8(config, tmp_path):
    model = convert(llama(), config.replace(activation_scheme="dynamic"))
    with pytest.raises(Exception, match="converted to FP8 already"):
        trainer(model, tmp_path / "run", FP8Callback(config, purpose="quantize")).train()
    assert len(fp8_modules(model)) == 14


def test_an_error_at_the_end_loses_nothing(config, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    expected, _ = trained(tmp_path / "plain")
    monkeypatch.setattr(outcome, "save_into", full)
    model, callback = llama(), FP8Callback(config, purpose="quantize")
    with pytest.raises(OSError, match="No space left"):
        trainer(model, tmp_path / "run", callback).train()
    assert same(weights(AutoModelForCausalLM.from_pretrained(tmp_path / "run")), weights(expected))
    assert same(weights(model), weights(expected)) and not fp8_modules(model)
    assert state_of(model) is None and hooked(model) == [] and callback.saved_to is None


def test_layers_that_no_batch_reaches_are_told_after_the_first_step(config, tmp_path, caplog):
    model = llama()
    model.model.spare = nn.Linear(32, 32)
    run = trainer(model, tmp_path / "run", FP8Callback(config, purpose="quantize"))
    with pytest.raises(Exception, match="never reached by calibration: model.spare"):
        run.train()
    assert "the first step of training did not reach ['model.spare']" in caplog.text
    assert (tmp_path / "run" / "model.safetensors").is_file()
