"""Every way to generate gives what it gives with a cache of rounded values."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers as hf
from cache.conftest import (
    CACHE,
    SCALES,
    attention_modules,
    cache_of,
    calibrate,
    fp8_caches,
    llama,
    rounding_caches,
    tiny,
)

from optimum_fp8.cache import FP8Tensor, cache_record, detach_cache, in_fp8
from optimum_fp8.errors import FP8ConfigError, FP8NotAvailableError, FP8ScaleError

GREEDY = {"max_new_tokens": 10, "min_new_tokens": 10, "do_sample": False}


@pytest.fixture(params=["static", "dynamic"])
def scales_of(request):
    return SCALES[request.param]


@pytest.fixture(params=["full", "sliding", "hybrid"])
def model(request, ids) -> Any:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    if request.param == "full":
        model = llama()
    elif request.param == "sliding":
        model = tiny(hf.MistralForCausalLM, hf.MistralConfig, **sizes, sliding_window=6)
    else:
        sizes |= {"use_sliding_window": True, "sliding_window": 6}
        sizes |= {"layer_types": ["sliding_attention", "full_attention"]}
        model = tiny(hf.Qwen2ForCausalLM, hf.Qwen2Config, **sizes)
    calibrate(model, lambda: model.generate(ids, **GREEDY))
    return model


@pytest.fixture
def exact(model) -> Any:
    """The model in float64, where the same value computed in other company hardly ever rounds to another FP8 code."""
    return model.double()


def generate(model: Any, ids: torch.Tensor, **options: Any) -> Any:
    torch.manual_seed(5)
    options = GREEDY | {"attention_mask": torch.ones_like(ids)} | options
    return model.generate(ids, **options, output_logits=True, return_dict_in_generate=True)


def assert_same(found: Any, expected: Any) -> None:
    assert torch.equal(found.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(found.logits), torch.stack(expected.logits), atol=2e-5, rtol=1e-4)


MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 1.5, "top_k": 20},
    "several samples": {"do_sample": True, "num_return_sequences": 3},
    "beams": {"num_beams": 3},
    "beams, sampled": {"num_beams": 3, "do_sample": True},
    "beams returned": {"num_beams": 4, "num_return_sequences": 2, "early_stopping": True},
    "static": {"cache_implementation": "static"},
    "static, beams": {"cache_implementation": "static", "num_beams": 2},
    "chunked prefill": {"prefill_chunk_size": 4},
    "static, chunked prefill": {"cache_implementation": "static", "prefill_chunk_size": 4, "disable_compile": True},
}


@pytest.mark.core
@pytest.mark.parametrize("mode", MODES)
def test_mode(model, ids, scales_of, mode):
    with rounding_caches(model, scales_of):
        expected = generate(model, ids, **MODES[mode])
    with fp8_caches(model, scales_of):
        found = generate(model, ids, **MODES[mode])
    assert all(in_fp8(layer) for layer in cache_of(found).layers)
    assert_same(found, expected)


@pytest.mark.parametrize("implementation", ["offloaded", "offloaded_static"])
def test_offloading_without_a_cuda_device_is_refused(model, ids, scales_of, implementation):
    with fp8_caches(model, scales_of), pytest.raises(FP8NotAvailableError, match="is to offload.*no CUDA device"):
        generate(model, ids, cache_implementation=implementation)


class _Offloaded(hf.DynamicCache):
    """Fetches a layer before it is updated, and offloads it behind, as transformers does with two devices."""

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        for layer in self.layers[layer_idx : layer_idx + 1]:
            layer.prefetch()
        found = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        self.layers[layer_idx].offload()
        return found


@pytest.mark.core
def test_layers_that_are_elsewhere_until_they_are_needed(model, ids, scales_of, elsewhere):
    with fp8_caches(model, scales_of):
        expected = generate(model, ids)
        found = generate(model, ids, **{CACHE: _Offloaded(config=model.config)})
    assert torch.equal(found.sequences, expected.sequences)
    assert torch.equal(torch.stack(found.logits), torch.stack(expected.logits))
    assert all(in_fp8(layer) and layer.inner.keys.is_meta for layer in cache_of(found).layers) and elsewhere


@pytest.mark.core
def test_left_padding(model, ids, scales_of):
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    padded = ids.masked_fill(mask == 0, 0)
    with fp8_caches(model, scales_of):
        together = generate(model, padded, attention_mask=mask)
        alone = generate(model, ids[:1, 4:])
    # Not `exact`: in float64, transformers makes rows that may attend to nothing NaN.
    logits = torch.stack(together.logits)[:, :1]
    torch.testing.assert_close(logits, torch.stack(alone.logits), atol=1e-2, rtol=0)
    assert torch.equal(together.sequences[0, -10:], alone.sequences[0, -10:])


@pytest.mark.parametrize("options", [{"prompt_lookup_num_tokens": 3}, {"assistant_model": True}], ids=str)
def test_assisted_decoding_changes_no_token(exact, ids, scales_of, options):
    prompt = torch.cat([ids[:1], ids[:1]], dim=1)
    assistant = llama(num_hidden_layers=1).double()
    with fp8_caches(exact, scales_of), fp8_caches(assistant, SCALES["dynamic"]):
        plain = generate(exact, prompt)
        if "assistant_model" in options:
            options = {"assistant_model": assistant}
        assisted = generate(exact, prompt, **options)
        assert all(in_fp8(layer) for layer in cache_of(assisted).layers)
    assert torch.equal(assisted.sequences, plain.sequences)


def test_an_assistant_that_guesses_right_is_cropped_less(ids):
    """The same model as its own assistant: guesses are accepted, and the caches roll back by single tokens."""
    model = llama().double()
    with fp8_caches(model, SCALES["dynamic"]):
        plain = generate(model, ids[:1])
        assisted = generate(model, ids[:1], assistant_model=model)
    assert torch.equal(assisted.sequences, plain.sequences)


@pytest.mark.core
def test_a_prefix_is_reused(exact, ids, scales_of):
    with fp8_caches(exact, scales_of), torch.no_grad():
        whole = generate(exact, ids)
        prefix = hf.DynamicCache(config=exact.config)
        exact(ids[:, :7], **{CACHE: prefix})
        assert all(in_fp8(layer) for layer in prefix.layers)
        reused = [generate(exact, ids, **{CACHE: copy.deepcopy(prefix)}) for _ in range(2)]
        assert prefix.get_seq_length() == 7
    for output in reused:
        assert_same(output, whole)


@pytest.mark.core
def test_a_conversation_goes_on_with_its_cache(exact, ids, scales_of):
    with fp8_caches(exact, scales_of):
        first = generate(exact, ids)
        again = torch.cat([first.sequences, ids[:, :3]], dim=1)
        continued = generate(exact, again, **{CACHE: cache_of(first)})
        fresh = generate(exact, again)
    assert_same(continued, fresh)


@pytest.mark.core
def test_plain_forward_and_the_inner_model(model, ids, scales_of):
    with rounding_caches(model, scales_of), torch.no_grad():
        expected = [model(ids).logits, model.model(ids).last_hidden_state]
    with fp8_caches(model, scales_of), torch.no_grad():
        outputs = [model(ids), model.model(ids)]
        uncached = model(ids, use_cache=False)
    for output, values in zip(outputs, expected, strict=True):
        assert all(in_fp8(layer) for layer in cache_of(output).layers)
        torch.testing.assert_close(output[0], values, atol=2e-5, rtol=1e-4)
    assert cache_of(uncached) is None
    with torch.no_grad():  # no cache, nothing rounded
        assert torch.equal(uncached.logits, model(ids, use_cache=False).logits)


def test_steps_equal_one_forward(exact, ids, scales_of):
    with fp8_caches(exact, scales_of), torch.no_grad():
        whole = exact(ids).logits
        cache, steps = hf.DynamicCache(config=exact.config), []
        for part in (ids[:, :4], ids[:, 4:5], ids[:, 5:6], ids[:, 6:9], ids[:, 9:10], ids[:, 10:]):
            steps.append(exact(part, **{CACHE: cache}).logits)
    torch.testing.assert_close(torch.cat(steps, 1), whole, atol=2e-5, rtol=1e-4)


FLEX = pytest.param("flex_attention", marks=pytest.mark.slow)  # it is always compiled


@pytest.mark.parametrize("implementation", ["eager", "sdpa", FLEX])
def test_the_models_own_attention_reads_it(ids, scales_of, implementation):
    model = llama()
    calibrate(model, lambda: model(ids))
    model.set_attn_implementation(implementation)
    with rounding_caches(model, scales_of):
        expected = generate(model, ids)
    with fp8_caches(model, scales_of):
        assert_same(generate(model, ids), expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    "make",
    [pytest.param(hf.DynamicCache, marks=pytest.mark.slow), lambda config: hf.StaticCache(config, max_cache_len=24)],
)
def test_compiled_without_graph_breaks(ids, scales_of, make):
    model = llama()
    calibrate(model, lambda: model(ids))

    def run(forward: Any) -> torch.Tensor:
        cache, tokens, logits = make(config=model.config), ids, []
        for _ in range(4):
            logits.append(forward(tokens, **{CACHE: cache}).logits[:, -1:])
            tokens = logits[-1].argmax(-1)
        return torch.cat(logits, 1)

    with fp8_caches(model, scales_of), torch.no_grad():
        expected = run(model)
        torch._dynamo.reset()
        found = run(torch.compile(model, backend="aot_eager", fullgraph=True))
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)


def test_a_copy_of_the_model_has_its_own_scales(ids):
    model = llama()
    calibrate(model, lambda: model(ids))
    with fp8_caches(model, SCALES["static"]), torch.no_grad():
        clone = copy.deepcopy(model)
        for module in attention_modules(clone).values():
            module.k_scale *= 2
        found, other = cache_of(model(ids)).layers[0].keys, cache_of(clone(ids)).layers[0].keys
    assert torch.equal(other.scale, found.scale * 2)
    assert cache_record(attention_modules(clone)["model.layers.0.self_attn"]).layers == 1
    detach_cache(clone.modules())
    assert not in_fp8(cache_of(clone(ids)).layers[0])


def test_modules_without_scales_keep_their_cache(ids):
    model = llama()
    calibrate(model, lambda: model(ids))
    del model.model.layers[0].self_attn.k_scale
    with fp8_caches(model, SCALES["static"]):
        layers = cache_of(generate(model, ids)).layers
    assert [in_fp8(layer) for layer in layers] == [False, True]


def test_a_users_filled_cache_is_quantized(ids, scales_of):
    model = llama()
    calibrate(model, lambda: model(ids))
    cache = hf.DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids[:, :7], **{CACHE: cache})
        keys = cache.layers[1].keys
        with fp8_caches(model, scales_of):
            model(ids[:, 7:], **{CACHE: cache})
    scale = getattr(scales_of(model.model.layers[1].self_attn), "k", None)
    layer = cache.layers[1]
    assert in_fp8(layer) and layer.get_seq_length() == 11
    assert (layer.keys[:, :, :7] - keys).abs().max() < keys.abs().max() / 14
    assert (layer.keys.scale.shape == (2, 2, 11, 1)) if scale is None else (layer.keys.scale is scale)


def test_a_users_empty_cache_of_the_old_form_is_filled(ids, scales_of):
    model, cache = llama(), hf.DynamicCache()
    calibrate(model, lambda: model(ids))
    with fp8_caches(model, scales_of), torch.no_grad():
        output = model(ids, **{CACHE: cache})
    assert cache_of(output) is cache and all(in_fp8(layer) for layer in cache.layers)
    keys, values, *_ = next(iter(cache))
    assert isinstance(keys, FP8Tensor) and values.shape == (2, 2, 11, 8)


def test_a_reset_cache_takes_another_models_scales(ids):
    model, cache = llama(), hf.DynamicCache()
    calibrate(model, lambda: model(ids))
    with torch.no_grad():
        with fp8_caches(model, SCALES["dynamic"]):
            model(ids, **{CACHE: cache})
        with fp8_caches(model, SCALES["static"]):
            model(ids[:, :1], **{CACHE: cache})
            assert cache.layers[0].scale_layer is not None  # what it holds has dynamic scales
            cache.reset()
            model(ids, **{CACHE: cache})
            assert cache.layers[0].scale_layer is None and cache.get_seq_length() == 11


def test_a_cache_that_quantizes_by_itself_is_refused(ids):
    model = llama()
    options = {"cache_implementation": "quantized", "cache_config": {"backend": "fp8"}}
    with fp8_caches(model, SCALES["dynamic"]), pytest.raises(FP8ConfigError, match="Fp8QuantizedLayer.*leave out"):
        generate(model, ids, **options)


def test_a_filled_encoder_decoder_cache_is_quantized_where_it_grows(ids):
    options = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4}
    model = tiny(hf.T5ForConditionalGeneration, hf.T5Config, **options, decoder_start_token_id=0)
    with torch.no_grad():
        cache = cache_of(model(input_ids=ids, decoder_input_ids=ids))
        with fp8_caches(model, SCALES["dynamic"]):
            model(input_ids=ids, decoder_input_ids=ids[:, :1], **{CACHE: cache})
    assert in_fp8(cache.self_attention_cache.layers[0]) and not in_fp8(cache.cross_attention_cache.layers[0])
    assert cache.get_seq_length() == 12 and cache.cross_attention_cache.get_seq_length() == 11


@pytest.mark.parametrize("bad", [0.0, float("nan"), float("inf")])
def test_unsound_scales_are_refused(ids, bad):
    model = llama()
    calibrate(model, lambda: model(ids))
    model.model.layers[1].self_attn.v_scale.fill_(bad)
    with (
        fp8_caches(model, SCALES["static"]),
        pytest.raises(FP8ScaleError, match=r"LlamaAttention \(layer 1\).*v scale"),
    ):
        model(ids)


class Remembering(hf.DynamicLayer):
    """A layer that computes with what it holds, as some models define."""

    def update(self, key_states, value_states, *args, **kwargs):
        keys, values = super().update(key_states, value_states)
        return keys * 0.5, values


def test_layers_that_compute_stay_in_high_precision_and_say_so(ids):
    model = llama()
    make = lambda: hf.Cache(layers=[Remembering(), hf.DynamicLayer()])  # noqa: E731
    with fp8_caches(model, SCALES["dynamic"]), torch.no_grad():
        cache = make()
        model(ids, **{CACHE: cache})
        records = [cache_record(module) for module in attention_modules(model).values()]
    assert [in_fp8(layer) for layer in cache.layers] == [False, True]
    assert records[0].refused == {"Remembering does more than hold keys and values": 1} and records[1].layers == 1
