"""Calibration goes on decoding where attention is measured."""

from __future__ import annotations

import pytest
import torch
import transformers as hf
from attention_models import FAMILIES
from tiny_models import tiny_bert, tiny_llama

from optimum_fp8 import FP8Config, calibrate, prepare
from optimum_fp8.calibration.decode import decodes
from optimum_fp8.errors import FP8CalibrationError, FP8ConfigError
from optimum_fp8.lifecycle.state import state_of

IDS = torch.arange(3, 17).view(2, 7)


def counts(model, steps, inputs, **options):
    """How many queries each attention module was measured on."""
    config = FP8Config(dataset=[inputs], decode_steps=steps, attention=True, **options)
    measured = state_of(calibrate(prepare(model, config))).measurements.tensors
    return {name: int(value.statistics()["count"]) for (name, kind), value in measured.items() if kind == "q"}


@pytest.mark.core
@pytest.mark.parametrize("family, inside", [("gpt2", "attn"), ("t5", "EncDecAttention"), ("mpt", "attn")])
def test_decoding_adds_to_what_was_measured(family, inside):
    family = FAMILIES[family]
    few, many = (counts(family.make(), steps, family.inputs) for steps in (0, 4))
    added = {name: many[name] - few[name] for name in few if inside in name}
    assert added and set(added.values()) == {2 * 4 * 32}  # rows, steps, values a token
    encoder = [name for name in few if name.startswith("encoder")]
    assert all(many[name] == few[name] for name in encoder)


def test_models_that_do_not_generate_are_run_forward_only():
    model = tiny_bert()
    assert not decodes(model) and not decodes(torch.nn.Linear(2, 2)) and decodes(tiny_llama())
    assert set(counts(model, 4, {"input_ids": IDS}).values()) == {2 * 7 * 32}


class Denoiser(hf.LlamaModel):
    """A model that generates, but not token by token: it has none of the methods of transformers' generation."""

    def generate(self, input_ids):
        return self(input_ids).last_hidden_state.argmax(-1)

    @classmethod
    def can_generate(cls):
        return True


def test_models_that_generate_otherwise_are_run_forward_only():
    model = Denoiser(tiny_llama().config)
    assert not decodes(model)
    assert set(counts(model, 4, {"input_ids": IDS}).values()) == {2 * 7 * 32}


def test_without_attention_nothing_is_decoded():
    calls, model = [], tiny_llama()
    model.register_forward_pre_hook(lambda *args: calls.append(1))
    calibrate(prepare(model, FP8Config(dataset=[{"input_ids": IDS}])))
    assert calls == [1]


def test_a_batch_without_a_cache_is_run_as_it_is():
    calls, model = [], tiny_llama()
    model.register_forward_pre_hook(lambda module, args, kwargs: calls.append(kwargs), with_kwargs=True)
    assert set(counts(model, 4, {"input_ids": IDS, "use_cache": False}).values()) == {2 * 7 * 32}
    assert [set(call) for call in calls] == [{"input_ids", "use_cache"}] and calls[0]["use_cache"] is False


def test_a_model_that_cannot_go_on_says_what_to_do():
    model = tiny_llama()

    def only_prompts(module, args, kwargs):
        if kwargs["input_ids"].shape[1] == 1:
            raise ValueError("one token is not a prompt")

    model.register_forward_pre_hook(only_prompts, with_kwargs=True)
    with pytest.raises(FP8CalibrationError, match=r"one token is not a prompt; decode_steps=0 leaves out decoding"):
        counts(model, 2, {"input_ids": IDS})


@pytest.mark.parametrize("steps", [-1, 1.5, True, None])
def test_steps_are_a_whole_number(steps):
    with pytest.raises(FP8ConfigError, match="decode_steps"):
        FP8Config(decode_steps=steps)
