"""Dequantized models are as if loaded in high precision; of converted ones all that is not in FP8 can be trained."""

from __future__ import annotations

import pytest
import torch
from fresh import TRANSFORMERS
from hf.conftest import llama
from torch import nn
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from optimum_fp8 import FP8Config, calibrate, convert, dequantize, finalize_calibration, prepare, quantization_report
from optimum_fp8.errors import FP8NotAvailableError
from optimum_fp8.lifecycle import state_of, unwrapped
from optimum_fp8.modules import fp8_modules

CONFIG = FP8Config(activation_scheme="weight_only", quantize_lm_head=True)


def trainer(model, folder) -> Trainer:
    options = {
        "per_device_train_batch_size": 2,
        "max_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "save_strategy": "no",
    }
    rows = [{"input_ids": torch.arange(i, i + 8), "labels": torch.arange(i, i + 8)} for i in range(4)]
    return Trainer(model, TrainingArguments(str(folder), **options), train_dataset=rows, eval_dataset=rows)


@torch.no_grad()
def logits(model, ids):
    return model(ids).logits


def loaded(folder, batches):
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=CONFIG)


def reloaded(folder, batches):
    loaded(folder, batches).save_pretrained(f"{folder}-fp8")
    return AutoModelForCausalLM.from_pretrained(f"{folder}-fp8")


def converted(folder, batches):
    return convert(AutoModelForCausalLM.from_pretrained(folder), CONFIG)


def with_attention(folder, batches):
    model = AutoModelForCausalLM.from_pretrained(folder)
    prepare(model, FP8Config(attention=True, kv_cache=True, dataset=batches))
    return convert(calibrate(model))


def measuring(folder, batches):
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=FP8Config(activation_scheme="static"))


@pytest.mark.parametrize("make", [loaded, reloaded, converted, with_attention, measuring])
def test_a_dequantized_model_has_no_trace_of_fp8(save, batches, ids, tmp_path, make):
    folder = save(llama(tied=True), torch.float32)
    plain = AutoModelForCausalLM.from_pretrained(folder)
    model = make(folder, batches)
    assert dequantize(model) is model
    assert not fp8_modules(model) and state_of(model) is None
    for part in model.modules():
        assert not getattr(part, "is_quantized", False) and getattr(part, "hf_quantizer", None) is None
        assert not hasattr(part, "quantization_method")
        config = getattr(part, "config", None)
        assert not hasattr(config, "quantization_config") and not getattr(config, "_is_quantized", False)
    assert model.config.to_dict() | {"_name_or_path": ""} == plain.config.to_dict() | {"_name_or_path": ""}
    assert model.config._attn_implementation == plain.config._attn_implementation
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert [type(module) for module in model.modules()] == [type(module) for module in plain.modules()]
    with torch.no_grad():
        assert type(model(ids).past_key_values.layers[0].keys) is torch.Tensor

    trainer(model, tmp_path / "trainer").train()
    model.eval().save_pretrained(tmp_path / "plain")
    expected = logits(model, ids)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert torch.equal(logits(again, ids), expected) and again.lm_head.weight is again.model.embed_tokens.weight


def test_what_a_dequantized_model_saves_needs_no_plugin(save, batches, tmp_path):
    dequantize(loaded(save(llama()), batches)).save_pretrained(tmp_path / "plain")
    script = (
        "import sys, transformers\n"
        f"model = transformers.AutoModelForCausalLM.from_pretrained({str(tmp_path / 'plain')!r})\n"
        "assert 'optimum_fp8' not in sys.modules\nprint(type(model.model.layers[0].mlp.up_proj).__name__)"
    )
    assert "Linear" in TRANSFORMERS.run(script, folder=str(tmp_path))


def test_a_model_inside_of_another_module(save, batches):
    whole = nn.ModuleDict({"language": loaded(save(llama(tied=True)), batches)})
    dequantize(whole)
    model = whole["language"]
    assert not fp8_modules(whole) and state_of(model) is None and not hasattr(model.config, "quantization_config")
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("make", [loaded, converted])
def test_trainer_evaluates_and_predicts_and_trains_what_it_is_left_of_what_is_not_in_fp8(save, batches, tmp_path, make):
    model = make(save(llama(), torch.float32), batches)
    runs = trainer(model, tmp_path / "trainer")
    expected = trainer(dequantize(make(str(tmp_path / "model"), batches)), tmp_path / "plain").evaluate()["eval_loss"]
    assert runs.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-3)
    assert runs.predict(runs.eval_dataset).predictions.shape == (4, 8, 128)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    model.get_input_embeddings().requires_grad_(False)  # all of a converted model is not trained
    runs.train()
    for name, value in model.named_parameters():
        assert torch.equal(value.view(torch.uint8), before[name].view(torch.uint8)) != value.requires_grad, name


@pytest.mark.parametrize("options", [{"new_num_tokens": 140}, {"new_num_tokens": 100}, {"pad_to_multiple_of": 100}])
@pytest.mark.parametrize("tied", [False, True])
def test_resizing_with_a_head_in_fp8_is_refused_and_nothing_is_changed(save, batches, ids, tied, options):
    model = loaded(save(llama(tied)), batches)
    expected = logits(model, ids)
    with pytest.raises(FP8NotAvailableError, match="resize_token_embeddings: lm_head is in FP8.*128 rows"):
        model.resize_token_embeddings(**options)
    assert model.resize_token_embeddings(128) is model.get_input_embeddings()
    assert torch.equal(logits(model, ids), expected)
    assert dequantize(model).resize_token_embeddings(140).weight.shape[0] == model.lm_head.weight.shape[0] == 140


def test_resizing_with_a_head_in_high_precision(save, ids, tmp_path):
    config = FP8Config(activation_scheme="weight_only")
    model = AutoModelForCausalLM.from_pretrained(save(llama(tied=True)), quantization_config=config)
    model.resize_token_embeddings(140)
    expected = logits(model, ids)
    model.save_pretrained(tmp_path / "fp8")
    again = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "fp8"), ids)
    assert expected.shape[-1] == 140 and torch.equal(again, expected)


class Wrapper(nn.Module):
    """Named as FSDP names what is in it."""

    def __init__(self, module):
        super().__init__()
        self._fsdp_wrapped_module = module

    def forward(self, *args):
        return self._fsdp_wrapped_module(*args)


WRAPPERS = {
    "torch.compile": lambda model: torch.compile(model, backend="eager"),
    "DataParallel": nn.DataParallel,
    "FSDP": Wrapper,
    "both": lambda model: torch.compile(nn.DataParallel(model), backend="eager"),
}


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wrappers_are_seen_through(wrapper, tmp_path):
    model, x = net(), torch.randn(4, 8)
    whole = WRAPPERS[wrapper](model)
    config = FP8Config(dataset=[x], dump_stats_path=str(tmp_path / "stats"))
    assert unwrapped(whole) is model
    assert prepare(whole, config) is whole and calibrate(whole) is whole
    assert finalize_calibration(whole).samples == 4
    assert convert(whole) is whole and len(fp8_modules(model)) == 2
    assert len(quantization_report(whole).quantized) == 2
    with torch.no_grad():
        assert torch.equal(model(x), convert(net(), config.replace(mode="QUANTIZE", dataset=None))(x))
        assert torch.equal(whole(x), model(x))
    assert dequantize(whole) is whole and not fp8_modules(model)
