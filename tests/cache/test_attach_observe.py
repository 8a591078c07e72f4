"""What is seen of what models write to their caches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf
from cache.conftest import CACHE, SCALES, attention_modules, cache_of, fp8_caches, llama, tiny
from cache.test_attach_families import FAMILIES, IDS, generated

from optimum_fp8.cache import in_fp8, observe_caches
from optimum_fp8.errors import FP8StateError

pytestmark = pytest.mark.core


class Seen(dict):
    """Everything that was written, by module, put together along the length."""

    def __call__(self, name: str, keys: torch.Tensor, values: torch.Tensor) -> None:
        old = self.get(name)
        new = [x.clone() for x in (keys, values)]
        self[name] = new if old is None else [torch.cat(pair, dim=2) for pair in zip(old, new, strict=True)]


def watched(model: Any, inputs: dict[str, torch.Tensor], **options: Any) -> tuple[Seen, Any]:
    seen = Seen()
    watch = observe_caches(attention_modules(model), seen)
    output = generated(model, inputs, **options)
    watch.remove()
    return seen, output


@pytest.mark.parametrize(
    "family", ["llama", "deepseek_v3, MLA", "bloom", "falcon_h1, attention and state in one layer"]
)
def test_all_that_is_cached_is_seen(family):
    model_class, config_class, options, inputs, _ = FAMILIES[family]
    model = tiny(model_class, config_class, **options)
    seen, output = watched(model, inputs)
    modules = attention_modules(model)
    assert set(seen) == set(modules)
    for name, (keys, values) in seen.items():
        layer = cache_of(output).layers[modules[name].layer_idx]
        assert torch.equal(layer.keys, keys) and torch.equal(layer.values, values)
    plain = generated(model, inputs)
    assert torch.equal(plain.sequences, output.sequences) and torch.equal(plain.logits[-1], output.logits[-1])


def test_latents_are_what_is_seen_of_mla():
    model_class, config_class, options, inputs, _ = FAMILIES["deepseek_v3, MLA"]
    model = tiny(model_class, config_class, **options)
    latents = []
    norm = model.model.layers[0].self_attn.kv_a_layernorm
    hook = norm.register_forward_hook(lambda module, args, output: latents.append(output))
    seen, _ = watched(model, inputs, max_new_tokens=1, min_new_tokens=1)
    hook.remove()
    keys, values = seen["model.layers.0.self_attn"]
    assert keys.shape == (2, 1, 11, 16) and values.shape == (2, 1, 11, 4)
    assert torch.equal(keys[:, 0], latents[0])


@pytest.mark.parametrize("family", ["t5, cross", "bart, cross", "whisper, cross"])
def test_self_and_cross_attention_are_told_apart(family):
    model_class, config_class, options, inputs, _ = FAMILIES[family]
    model = tiny(model_class, config_class, **options)
    seen, output = watched(model, inputs)
    cache = cache_of(output)
    for name, (keys, _) in seen.items():
        crossing = "encoder_attn" in name or "EncDecAttention" in name
        part = cache.cross_attention_cache if crossing else cache.self_attention_cache
        assert torch.equal(part.layers[attention_modules(model)[name].layer_idx].keys, keys)
    assert len(seen) == 4


def test_static_caches_beams_and_sliding_windows(ids):
    model = tiny(hf.MistralForCausalLM, hf.MistralConfig, **FAMILIES["mistral, sliding"][2])
    for options in ({"cache_implementation": "static"}, {"num_beams": 2}, {"prefill_chunk_size": 4}):
        seen, output = watched(model, IDS, **options)
        keys, _ = seen["model.layers.1.self_attn"]
        assert keys.shape[2] == 11 + 7
        last = cache_of(output).layers[1].keys[:, :, -1:]
        assert "num_beams" in options or torch.equal(keys[:, :, -1:], last)  # beams have been reordered since


def test_nothing_is_seen_afterwards_or_without_a_cache(ids):
    model, seen = llama(), Seen()
    watch = observe_caches(attention_modules(model), seen)
    with torch.no_grad():
        model(ids, use_cache=False)
        assert not seen
        cache = cache_of(model(ids))
        watch.remove()
        model(ids[:, :1], **{CACHE: cache})
    assert seen["model.layers.0.self_attn"][0].shape[2] == 11 and cache.get_seq_length() == 12
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_watched_cache_becomes_fp8(ids):
    model = llama()
    watch = observe_caches(attention_modules(model), Seen())
    with torch.no_grad():
        cache = cache_of(model(ids))
        watch.remove()
        with fp8_caches(model, SCALES["dynamic"]):
            model(ids[:, :1], **{CACHE: cache})
    assert all(in_fp8(layer) and type(layer.inner) is hf.cache_utils.DynamicLayer for layer in cache.layers)


def test_an_fp8_cache_cannot_be_measured(ids):
    model = llama()
    with fp8_caches(model, SCALES["dynamic"]), torch.no_grad():
        cache = cache_of(model(ids))
    observe_caches(attention_modules(model), Seen())
    with pytest.raises(FP8StateError, match=r"model.layers.0.self_attn.*FP8 already: begin with an empty cache"):
        model(ids[:, :1], **{CACHE: cache})
