"""Caches of layers with a sliding window left in high precision: those of the other layers become FP8."""

from __future__ import annotations

import pytest
import torch
import transformers as hf
from cache.conftest import tiny
from cache.test_attach_families import FAMILIES, IDS, TEXT

from optimum_fp8 import FP8Config, convert, prepare, quantization_report
from optimum_fp8.cache import in_fp8

pytestmark = pytest.mark.core
# Whether the cache of each of two layers is in FP8.
LEFT = {
    "llama": [True, True],
    "gemma2, hybrid, soft cap": [False, True],
    "gemma3, hybrid": [False, True],
    "gpt_oss, sinks": [False, True],
}


def converted(family, **options):
    cls, config, sizes, _, _ = FAMILIES[family]
    model = prepare(
        tiny(cls, config, **sizes), FP8Config(kv_cache=True, target="cpu", kv_cache_skip="sliding", **options)
    )
    with torch.no_grad():
        model(**IDS, use_cache=True)
    return convert(model)


@pytest.mark.parametrize("implementation", [None, "static"])
@pytest.mark.parametrize("family", LEFT)
def test_generated_with(family, implementation):
    model = converted(family)
    found = model.generate(
        **IDS, max_new_tokens=3, do_sample=False, return_dict_in_generate=True, cache_implementation=implementation
    )
    cache = found.cache if "cache" in found else found.past_key_values
    assert [in_fp8(layer) for layer in cache.layers] == LEFT[family]


def test_the_report_tells_why():
    rows = quantization_report(converted("gemma3, hybrid", attention=True)).attention
    assert [row.quantized for row in rows] == [True, True]
    assert "kv_cache_skip" in rows[0].reason and "kv_cache_skip" not in rows[1].reason


def test_saved_and_loaded(tmp_path):
    model = converted("gemma3, hybrid")
    model.save_pretrained(tmp_path)
    again = hf.Gemma3ForCausalLM.from_pretrained(tmp_path)
    assert again.config.quantization_config.kv_cache_skip == "sliding"
    with torch.no_grad():
        cache = again(**IDS, use_cache=True).past_key_values
        assert torch.equal(again(**IDS).logits, model(**IDS).logits)
    assert [in_fp8(layer) for layer in cache.layers] == [False, True]


@pytest.mark.parametrize("window, fp8", [(5, False), (None, True)])
def test_a_window_that_all_layers_have(window, fp8):
    """Mistral's configuration says its window once, and has no types of layers."""
    model = tiny(
        hf.MistralForCausalLM, hf.MistralConfig, **FAMILIES["mistral, sliding"][2] | {"sliding_window": window}
    )
    model = prepare(model, FP8Config(kv_cache=True, target="cpu", kv_cache_skip="sliding"))
    with torch.no_grad():
        model(**IDS, use_cache=True)
        cache = convert(model)(**IDS, use_cache=True).past_key_values
    assert [in_fp8(layer) for layer in cache.layers] == [fp8, fp8]


def test_attention_in_chunks():
    types = ["chunked_attention", "full_attention"]
    sizes = TEXT | {"head_dim": 8, "attention_chunk_size": 6, "layer_types": types, "num_local_experts": 2}
    model = tiny(hf.Llama4ForCausalLM, hf.Llama4TextConfig, **sizes, intermediate_size_mlp=48)
    model = prepare(model, FP8Config(kv_cache=True, target="cpu", kv_cache_skip="sliding"))
    with torch.no_grad():
        model(**IDS, use_cache=True)
        cache = convert(model)(**IDS, use_cache=True).past_key_values
    assert [in_fp8(layer) for layer in cache.layers] == [False, True]
