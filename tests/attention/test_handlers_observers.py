"""Every observer measures layers, attention and caches, from the call that loads a model to the one that reloads it."""

from __future__ import annotations

import os

import pytest
import torch
from attention_models import all_attention_scales
from hf.conftest import llama
from transformers import AutoModelForCausalLM

from optimum_fp8 import FP8Config, quantization_report
from optimum_fp8.modules.layer import fp8_modules

OBSERVERS = ["maxabs", "maxabs_per_channel", "percentile", "mse", "entropy", "moving_average", "save"]
HISTOGRAMS = ["percentile", "mse", "entropy"]
STATIC = {"attention": True, "kv_cache": True, "decode_steps": 2}


def load(folder, config=None):
    options = {} if config is None else {"quantization_config": config}
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **options)


def scales(model):
    layers = {name: module.input_scale.item() for name, module in fp8_modules(model).items()}
    return layers | {f"{name}.{key}": scale.flatten().tolist() for name, key, scale in all_attention_scales(model)}


@torch.no_grad()
def logits(model, ids):
    return model(ids).logits.float()


@pytest.mark.parametrize("observer", OBSERVERS[1:])
def test_loaded_measured_saved_and_reloaded(save, batches, ids, tmp_path, observer):
    folder = save(llama())
    config = FP8Config(dataset=batches, observer=observer, dump_stats_path=tmp_path / "stats", **STATIC)
    model, plain = load(folder, config), load(folder)
    assert quantization_report(model).quantized and model.generate(ids, max_new_tokens=3).shape[1] == ids.shape[1] + 3
    found, expected = logits(model, ids), logits(plain, ids)
    assert torch.nn.functional.cosine_similarity(found.flatten(), expected.flatten(), dim=0) > 0.98
    model.save_pretrained(tmp_path / "fp8")
    assert torch.equal(logits(load(tmp_path / "fp8"), ids), found)
    assert os.path.exists(tmp_path / "tensors") == (observer == "save")


@pytest.mark.slow
@pytest.mark.parametrize("written_by", HISTOGRAMS)
def test_one_file_serves_every_choice_of_range_as_if_measured_for_it(save, batches, tmp_path, written_by):
    folder, path = save(llama()), tmp_path / "stats"
    load(folder, FP8Config(mode="MEASURE", observer=written_by, dataset=batches, dump_stats_path=path, **STATIC))
    for number, (observer, method) in enumerate(
        (("mse", "maxabs_hw"), ("maxabs", "maxabs_pow2"), ("entropy", "maxabs_hw"))
    ):
        options = {"observer": observer, "scale_method": method, "target": "gaudi2", **STATIC}
        read = load(folder, FP8Config(mode="QUANTIZE", dump_stats_path=path, **options))
        own = tmp_path / f"own{number}"
        load(folder, FP8Config(mode="MEASURE", observer=observer, dataset=batches, dump_stats_path=own, **STATIC))
        measured = load(folder, FP8Config(mode="QUANTIZE", dump_stats_path=own, **options))
        assert scales(read) == scales(measured)


@pytest.mark.slow
@pytest.mark.parametrize("observer", HISTOGRAMS)
def test_scales_per_head_are_those_of_maxabs(save, batches, observer):
    folder, options = save(llama()), {"attention_granularity": "head", "dataset": batches, **STATIC}
    found, expected = (scales(load(folder, FP8Config(observer=name, **options))) for name in (observer, "maxabs"))
    heads = [name for name, scale in expected.items() if isinstance(scale, list) and len(scale) > 1]
    assert heads and all(found[name] == expected[name] for name in heads)


@pytest.mark.parametrize("observer", ["percentile", "mse", "moving_average"])
def test_a_cache_shares_the_scale_of_the_product_that_reads_it(save, batches, observer):
    """What was read from it again and again has other counts, and is still the same."""
    model = load(save(llama()), FP8Config(dataset=batches, observer=observer, **STATIC))
    names = {key for _, key, _ in all_attention_scales(model)}
    assert "k_scale" in names and not names & {"k_cache_scale", "v_cache_scale"}
