"""generate_batch with FP8 attention: the model's own attention runs, and it is said."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from attention_models import FAMILIES
from transformers import ContinuousBatchingConfig, GenerationConfig

from optimum_fp8 import FP8Config, convert, dequantize, prepare, quantization_report

# A cache that is as large as the prompts need: else its size follows from the memory that is free.
SMALL = ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=64)
PROMPTS = [[3, 4, 5, 6, 7], [9, 8, 7]]
GREEDY = GenerationConfig(max_new_tokens=5, do_sample=False, eos_token_id=-1, pad_token_id=0)


@torch.no_grad()
def converted(family="llama", **options):
    model = prepare(FAMILIES[family].make(), FP8Config(**options))
    model(**FAMILIES[family].inputs, use_cache=True)
    return convert(model)


def batch(model):
    results = model.generate_batch(PROMPTS, generation_config=GREEDY, continuous_batching_config=SMALL)
    return [list(result.generated_tokens) for _, result in sorted(results.items())]


def rows(model):
    return quantization_report(model).attention


SLOW = [pytest.param(keys, marks=pytest.mark.slow) for keys in (["attention"], ["kv_cache"])]


@pytest.mark.parametrize("keys", [["attention", "kv_cache"], *SLOW], ids=str)
def test_it_falls_back_and_says_so(keys, caplog):
    model, layers_only = converted(**dict.fromkeys(keys, True)), converted()
    with caplog.at_level(logging.WARNING, "optimum_fp8"):
        found = batch(model)
    assert found == batch(layers_only)  # exactly the model without FP8 attention
    assert caplog.text.count("generate_batch takes transformers' own attention") == 1
    for row in rows(model):
        assert any("generate_batch" in reason for reason in row.fallbacks) and not row.kernels
    assert "generate_batch" in str(quantization_report(model))
    assert model.config._attn_implementation == "optimum_fp8"

    caplog.clear()
    batch(model)
    assert "generate_batch" not in caplog.text  # once
    model.generate(torch.tensor(PROMPTS[:1]), generation_config=GREEDY)
    assert all(row.quantized and row.reason == "selected" for row in rows(model))
    if "attention" in keys:
        assert all(row.kernels for row in rows(model))


def test_copies_errors_and_models_in_high_precision_again():
    model = converted(attention=True)
    other = copy.deepcopy(model)
    batch(other)
    assert not any(row.fallbacks for row in rows(model)) and all(row.fallbacks for row in rows(other))
    with pytest.raises(AttributeError):
        model.init_continuous_batching(generation_config="greedy")
    assert model.config._attn_implementation == "optimum_fp8"
    model.set_attn_implementation("sdpa")
    batch(model)
    assert model.config._attn_implementation == "sdpa" and not any(row.fallbacks for row in rows(model))
    assert "init_continuous_batching" not in vars(dequantize(other))


def test_while_the_manager_runs():
    model = converted(attention=True)
    with model.continuous_batching_context_manager(GREEDY, continuous_batching_config=SMALL) as manager:
        assert manager.is_running() and not any(row.quantized for row in rows(model))
    assert all(row.quantized for row in rows(model))
