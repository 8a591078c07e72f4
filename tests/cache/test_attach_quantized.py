"""Converted models: with attention in FP8, a cache in FP8 changes no result, and is never expanded.

Attention rounds keys and values with the scales that the cache is written with, so over a cache in high precision it
takes the same codes.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers as hf
from cache.conftest import CACHE, attention_modules, cache_of, layers_of, llama, tiny
from cache.test_attach_families import FAMILIES, TEXT, generated
from cache.test_attach_generate import MODES

from optimum_fp8 import FP8Config, convert, dequantize, prepare
from optimum_fp8.attention import scales_of
from optimum_fp8.cache import FP8Tensor, cache_record, in_fp8

DYNAMIC = {"scale_method": "maxabs_pcs_pow2", "activation_scheme": "dynamic"}
SCHEMES = {"static": {}, "per head": {"attention_granularity": "head"}, "dynamic": DYNAMIC}


def quantized(model: Any, inputs: dict[str, torch.Tensor], kv_cache: bool, **options: Any) -> Any:
    model = copy.deepcopy(model)
    config = FP8Config(attention=True, kv_cache=kv_cache, **options)
    if config.scheme == "dynamic":
        return convert(model, config)
    prepare(model, config)
    generated(model, inputs)
    return convert(model)


@pytest.fixture
def refuse_to_expand(monkeypatch):
    def expand(tensor: FP8Tensor) -> torch.Tensor:
        raise AssertionError(f"{tuple(tensor.shape)} of a cache were expanded")

    def forbid() -> None:
        monkeypatch.setattr(FP8Tensor, "dequantize", expand)

    return forbid


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("mode", MODES)
def test_generation_is_that_over_a_high_precision_cache(ids, mode, scheme, refuse_to_expand):
    model = tiny(hf.MistralForCausalLM, hf.MistralConfig, **TEXT, sliding_window=6) if "beams" in mode else llama()
    inputs, options = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, MODES[mode]
    plain, cached = (quantized(model, inputs, kv_cache, **SCHEMES[scheme]) for kv_cache in (False, True))
    torch.manual_seed(5)
    expected = generated(plain, inputs, **options)
    refuse_to_expand()
    torch.manual_seed(5)
    found = generated(cached, inputs, **options)
    assert all(in_fp8(layer) for layer in cache_of(found).layers)
    assert not any(in_fp8(layer) for layer in cache_of(expected).layers)
    assert torch.equal(found.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(found.logits), torch.stack(expected.logits), atol=1e-5, rtol=1e-5)


READ_AS_STORED = [
    "qwen3",
    "mistral, sliding",
    "gemma2, hybrid, soft cap",
    "gpt_oss, sinks",
    "gpt2",
    "bloom",
    "falcon, one head of keys",
    "gptj",
    "t5, cross",
    "bart, cross",
    "whisper, cross",
]


# Where a model multiplies by itself, no kernel sums over tokens of different scales.
READ = [(family, scheme) for family in READ_AS_STORED for scheme in SCHEMES if (family, scheme) != ("bloom", "dynamic")]


@pytest.mark.parametrize("family, scheme", READ)
def test_attention_reads_what_is_stored(family, scheme, refuse_to_expand):
    model_class, config_class, options, inputs, count = FAMILIES[family]
    model = quantized(tiny(model_class, config_class, **options), inputs, True, **SCHEMES[scheme])
    refuse_to_expand()
    output = generated(model, inputs)
    assert sum(in_fp8(layer) for layer in layers_of(cache_of(output))) == count


@pytest.mark.parametrize("scheme", SCHEMES)
def test_latents_are_expanded_by_the_model_and_close(scheme):
    model_class, config_class, options, inputs, count = FAMILIES["deepseek_v3, MLA"]
    original = tiny(model_class, config_class, **options)
    plain, cached = (quantized(original, inputs, kv_cache, **SCHEMES[scheme]) for kv_cache in (False, True))
    with torch.no_grad():
        output, expected = cached(**inputs), plain(**inputs).logits
    assert sum(in_fp8(layer) for layer in cache_of(output).layers) == count
    assert ((output.logits - expected).norm() / expected.norm()).item() < 0.25
    module, layer = cached.model.layers[0].self_attn, cache_of(output).layers[0]
    if scheme != "dynamic":
        scales = scales_of(module)
        assert torch.equal(layer.scales.k, scales["k_cache_scale"])
        assert torch.equal(layer.scales.v, scales["v_cache_scale"])
    assert layer.keys.shape == (2, 1, 11, 16)  # the latents, not the keys of every head


def test_prefix_crop_and_continue(ids):
    model = quantized(llama(), {"input_ids": ids}, True)
    with torch.no_grad():
        whole = model(ids).logits
        cache = cache_of(model(ids))
        cache.crop(-4)
        again = model(ids[:, 7:], **{CACHE: copy.deepcopy(cache)}).logits
        wrong = model(ids[:, 6:-1], **{CACHE: cache}).logits
    torch.testing.assert_close(again, whole[:, 7:], atol=0.05, rtol=0)
    assert (wrong - whole[:, 7:]).abs().max() > 0.1


def test_dequantized_models_have_caches_in_high_precision(ids):
    model = quantized(llama(), {"input_ids": ids}, True)
    records = [cache_record(module).layers for module in attention_modules(model).values()]
    with torch.no_grad():
        assert all(in_fp8(layer) for layer in cache_of(model(ids)).layers)
        assert [cache_record(m).layers for m in attention_modules(model).values()] == [n + 1 for n in records]
        dequantize(model)
        assert not any(in_fp8(layer) for layer in cache_of(model(ids)).layers)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["per head", "dynamic"])
@pytest.mark.parametrize("make", [hf.DynamicCache, lambda config: hf.StaticCache(config, max_cache_len=24)])
def test_compiled_without_graph_breaks(ids, scheme, make):
    model = quantized(llama(), {"input_ids": ids}, True, **SCHEMES[scheme])

    def run(forward: Any) -> torch.Tensor:
        cache, tokens, logits = make(config=model.config), ids, []
        for _ in range(4):
            logits.append(forward(tokens, **{CACHE: cache}).logits[:, -1:])
            tokens = logits[-1].argmax(-1)
        assert all(in_fp8(layer) for layer in cache.layers)
        return torch.cat(logits, 1)

    with torch.no_grad():
        expected = run(model)
        torch._dynamo.reset()
        found = run(torch.compile(model, backend="aot_eager", fullgraph=True))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
