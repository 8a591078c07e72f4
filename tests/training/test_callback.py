"""FP8Callback: purposes, options, and the Trainers that it works with."""

from __future__ import annotations

import copy

import pytest
import torch
from training_runs import VOCABULARY, arguments, hooked, llama, rows, same, trainer, weights
from transformers import (
    PreTrainedTokenizerFast,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
    TrainerControl,
    TrainerState,
)

from optimum_fp8 import FP8Callback, FP8Config
from optimum_fp8.errors import FP8ConfigError, FP8NotAvailableError, FP8StateError
from optimum_fp8.modules import fp8_modules


@pytest.fixture
def config(tmp_path) -> FP8Config:
    return FP8Config(dump_stats_path=str(tmp_path / "ranges" / "run"))


@pytest.mark.parametrize(
    "given, options, message",
    [
        (FP8Config(), {"purpose": "quantise"}, "purpose='quantise' is not known: did you mean 'quantize'"),
        (FP8Config(), {"purpose": "quantize", "saveto": "x"}, "saveto='x' is no option of purpose='quantize': did you"),
        (FP8Config(), {"purpose": "measure", "save_to": "x"}, "save_to='x' is no option of purpose='measure'"),
        (None, {"purpose": "quantize"}, "purpose='quantize' needs a config, found none: pass FP8Config"),
        ({"target": "cpu"}, {}, "expected an FP8Config, found {'target': 'cpu'}"),
        (FP8Config(), {"during": "trainings"}, "during='trainings' is not known: did you mean 'training'"),
        (FP8Config(), {"every": 0}, "every=0 is not valid: expected a whole number of steps"),
        (FP8Config(), {"purpose": "monitor", "worst": True}, "worst=True is not valid"),
        (FP8Config(mode="QUANTIZE"), {"purpose": "quantize"}, "mode='QUANTIZE' is about a model that is loaded"),
    ],
)
def test_wrong_arguments(given, options, message):
    with pytest.raises(FP8ConfigError, match=message):
        FP8Callback(given, **options)


def test_attributes():
    callback = FP8Callback(FP8Config(), purpose="quantize")
    assert callback.measurements is callback.metrics is callback.saved_to is callback.rates is callback.summary is None
    with pytest.raises(AttributeError, match="nonsense"):
        callback.nonsense  # noqa: B018
    assert copy.copy(callback).purpose == "quantize"


def test_events_that_no_trainer_sends(tmp_path):
    with pytest.raises(FP8StateError, match="called by something other than a transformers.Trainer"):
        FP8Callback(FP8Config()).on_train_begin(arguments(tmp_path), TrainerState(), TrainerControl(), model=llama())


@pytest.mark.slow
def test_one_callback_for_two_trainers(config, tmp_path):
    callback = FP8Callback(config)
    first, second = (trainer(llama(), tmp_path / name, callback) for name in ("first", "second"))
    second.train()
    of_second = callback.measurements
    first.train()
    assert callback.measurements.encoded() == of_second.encoded()


@pytest.mark.slow
def test_two_purposes_in_one_training(config, tmp_path):
    both = FP8Callback(config, purpose="quantize"), FP8Callback(config, purpose="monitor", every=1)
    trainer(llama(), tmp_path / "run", *both).train()
    assert both[0].saved_to and both[1].rates


def test_a_copy_of_a_model_that_waits_for_evaluation_is_not_measured(config, tmp_path):
    model, callback = llama(), FP8Callback(config)
    trainer(model, tmp_path / "run", callback)
    copied = copy.deepcopy(model).eval()
    with torch.no_grad():
        copied(rows(1)[0]["input_ids"][None])
    assert callback.measurements is None and hooked(copied) == [""]


@pytest.mark.slow
def test_seq2seq_trainer_generates_with_both_models(config, tmp_path):
    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
    model = T5ForConditionalGeneration(T5Config(vocab_size=VOCABULARY, **sizes))
    lengths = []

    def length(predictions):
        lengths.append(predictions.predictions.shape)
        return {"length": float(predictions.predictions.shape[1])}

    options = {"predict_with_generate": True, "generation_max_length": 5, "max_steps": 2}
    callback = FP8Callback(config, purpose="quantize")
    Seq2SeqTrainer(
        model,
        arguments(tmp_path / "run", Seq2SeqTrainingArguments, **options),
        train_dataset=rows(4),
        eval_dataset=rows(2, seed=2),
        compute_metrics=length,
        callbacks=[callback],
    ).train()
    assert callback.metrics["fp8"]["eval_fp8_length"] == callback.metrics["full"]["eval_length"]
    assert len(lengths) == 2
    assert ("decoder.block.0.layer.1.EncDecAttention.k", "input") in callback.measurements.tensors
    found = T5ForConditionalGeneration.from_pretrained(callback.saved_to)
    assert len(fp8_modules(found)) == len(callback.measurements.tensors) // 2


@pytest.mark.slow
def test_adapters_are_measured_and_monitored_and_do_not_end_in_fp8(config, tmp_path):
    from peft import LoraConfig, get_peft_model

    def adapted():
        torch.manual_seed(0)
        return get_peft_model(llama(), LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))

    expected, model = adapted(), adapted()
    trainer(expected, tmp_path / "plain").train()
    callbacks = [FP8Callback(config), FP8Callback(config, purpose="monitor", every=2)]
    trainer(model, tmp_path / "run", *callbacks).train()
    assert same(weights(model), weights(expected)) and hooked(model) == []
    names = {name for name, _ in callbacks[0].measurements.tensors}
    assert len(names) == 14 and "base_model.model.model.layers.0.self_attn.q_proj.base_layer" in names
    assert callbacks[1].rates["drift"].keys() == names
    for purpose in ("quantize", "qat"):
        with pytest.raises(FP8NotAvailableError, match="peft, whose adapters are trained.*merge_lora"):
            trainer(adapted(), tmp_path / "run", FP8Callback(config, purpose=purpose)).train()


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {f"w{number}": number for number in range(VOCABULARY)}
    tokens = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    tokens.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokens, unk_token="w0", pad_token="w1", eos_token="w2")


@pytest.mark.slow
def test_trl_fine_tunes_and_ends_in_fp8(config, tmp_path, tokenizer):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    text = Dataset.from_list(
        [{"text": " ".join(f"w{3 + (7 * row + word) % 90}" for word in range(10))} for row in range(8)]
    )
    callbacks = [FP8Callback(config, purpose=purpose) for purpose in ("quantize", "monitor")]
    run = SFTTrainer(
        llama(),
        arguments(tmp_path / "run", SFTConfig, max_steps=2, max_length=16, bf16=False),
        train_dataset=text,
        eval_dataset=text,
        processing_class=tokenizer,
        callbacks=callbacks,
    )
    run.train()
    callback = callbacks[0]
    assert callback.metrics["fp8"]["eval_fp8_loss"] == pytest.approx(callback.metrics["full"]["eval_loss"], rel=0.05)
    assert (tmp_path / "run" / "fp8" / "tokenizer.json").is_file() and callbacks[1].rates["drift"]
