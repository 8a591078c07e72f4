"""Caches converted as a whole, and the cache to be used without a model."""

from __future__ import annotations

import io

import pytest
import torch
import transformers as hf
from cache.conftest import FMT, SCALES, cache_of, fp8_caches, layers_of, llama

from optimum_fp8.cache import CacheScales, FP8Cache, FP8Layer, convert_cache
from optimum_fp8.errors import FP8ConfigError, FP8ScaleError, FP8StateError

pytestmark = pytest.mark.core
ONE = CacheScales(FMT, torch.full((1,), 0.01), torch.full((1,), 0.02))
SLIDING = {"use_sliding_window": True, "sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]}
CONFIG = hf.Qwen2Config(num_hidden_layers=2, **SLIDING)


def states(length: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(1, 2, length, 8), torch.randn(1, 2, length, 8)


def test_a_cache_of_ones_own():
    cache = FP8Cache([ONE, CacheScales(FMT)], config=CONFIG)
    assert isinstance(cache, hf.DynamicCache) and cache.is_sliding == [True, False]
    assert [type(layer.inner) for layer in cache.layers] == [
        hf.cache_utils.DynamicSlidingWindowLayer,
        hf.cache_utils.DynamicLayer,
    ]
    keys, values = states()
    for index in range(2):
        found = cache.update(keys, values, index)
        assert all((x - y).abs().max() < 0.2 for x, y in zip(found, (keys, values), strict=True))
    assert cache.get_seq_length() == 3 and cache.layers[0].scale_layer is None
    assert cache.layers[1].scale_layer.keys.shape == (1, 2, 3, 1)


def test_without_a_config_every_layer_grows():
    cache = FP8Cache([ONE, None])
    assert [type(layer) for layer in cache.layers] == [FP8Layer, hf.cache_utils.DynamicLayer]


def test_a_model_without_hooks_takes_it(ids):
    model = llama()
    with torch.no_grad():
        with fp8_caches(model, SCALES["dynamic"]):
            expected = model(ids)
        cache = FP8Cache([CacheScales(FMT)] * 2, config=model.config)
        found = model.generate(ids, past_key_values=cache, max_new_tokens=1, output_logits=True, **_DICT)
    torch.testing.assert_close(found.logits[0], expected.logits[:, -1])  # the head of one position or of all
    assert cache_of(found) is cache and torch.equal(cache.layers[0].keys, cache_of(expected).layers[0].keys)


_DICT = {"return_dict_in_generate": True, "do_sample": False, "pad_token_id": 0}


def test_an_encoder_decoder_cache_takes_the_scales_of_both_halves():
    other = CacheScales(FMT, torch.full((1,), 0.03), torch.full((1,), 0.04))
    cache = hf.EncoderDecoderCache(hf.DynamicCache(config=CONFIG), hf.DynamicCache(config=CONFIG))
    assert convert_cache(cache, [ONE, ONE, other, None]) is cache
    assert [getattr(layer, "scales", None) for layer in layers_of(cache)] == [ONE, ONE, other, None]
    assert isinstance(cache.cross_attention_cache.layers[1], hf.cache_utils.DynamicLayer)
    for index in range(2):
        cache.self_attention_cache.update(*states(5), index)
    cache.crop(-2)
    assert cache.get_seq_length() == 3
    cache.reorder_cache(torch.tensor([0, 0]))
    assert cache.self_attention_cache.layers[0].keys.shape == (2, 2, 3, 8)


@pytest.mark.parametrize("count", [1, 3])
def test_as_many_scales_as_layers(count):
    with pytest.raises(FP8StateError, match=f"the cache has 2 layers and there are scales of {count}"):
        convert_cache(hf.DynamicCache(config=CONFIG), [ONE] * count)


def test_layers_that_cannot_be_fp8():
    linear = hf.cache_utils.LinearAttentionLayer()
    with pytest.raises(FP8StateError, match="layer 1.*LinearAttentionLayer holds no keys and values; give None"):
        convert_cache(hf.Cache(layers=[hf.cache_utils.DynamicLayer(), linear]), [ONE, ONE])
    cache = convert_cache(hf.Cache(layers=[hf.cache_utils.DynamicLayer(), linear]), [ONE, None])
    assert cache.layers[1] is linear
    with pytest.raises(FP8ConfigError, match="Fp8QuantizedLayer, which quantizes by itself"):
        convert_cache(hf.QuantizedCache("fp8", hf.LlamaConfig(num_hidden_layers=1)), [ONE])


def test_unsound_scales_are_refused_with_their_layer():
    unset = CacheScales(FMT, torch.full((1,), torch.nan), torch.ones(1))
    with pytest.raises(FP8ScaleError, match=r"layer 1: the k scale of its cache is \[nan\]"):
        FP8Cache([ONE, unset])


def test_saved_and_loaded_with_torch(ids):
    """As prompts are kept on disk; torch.load has to be told that it may build these classes."""
    model = llama()
    with fp8_caches(model, SCALES["dynamic"]), torch.no_grad():
        cache = cache_of(model(ids))
        file = io.BytesIO()
        torch.save(cache, file)
        file.seek(0)
        loaded = torch.load(file, weights_only=False)
        for name in ("keys", "values"):
            assert torch.equal(getattr(loaded.layers[1], name), getattr(cache.layers[1], name))
        token = ids[:, :1]
        options = {"attention_mask": torch.ones(2, 12, dtype=torch.int64)}
        found = model(token, past_key_values=loaded, **options).logits
        assert torch.equal(found, model(token, past_key_values=cache, **options).logits)
