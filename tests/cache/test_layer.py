"""FP8 layers against transformers' own layers that are given values rounded to FP8 beforehand."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers.cache_utils as hf
from hypothesis import given, settings
from hypothesis import strategies as st

from optimum_fp8.cache import CacheScales, FP8Cache, FP8Layer, FP8Tensor, convert_cache
from optimum_fp8.cache.layer import fp8_layer
from optimum_fp8.cache.layers import refusal
from optimum_fp8.errors import FP8ConfigError, FP8NotAvailableError, FP8ScaleError
from optimum_fp8.formats import number_format
from optimum_fp8.scales import PerToken, ScaleRule

pytestmark = pytest.mark.core
FMT = number_format()
H, D, LENGTH, WINDOW = 3, 8, 24, 6
PER_HEAD = torch.tensor([0.01, 0.02, 0.05]).view(H, 1, 1)
SCALES = {
    "per tensor": CacheScales(FMT, torch.tensor([0.02]), torch.tensor([0.01])),
    "per head": CacheScales(FMT, PER_HEAD, PER_HEAD * 0.5),
    "dynamic": CacheScales(FMT),
    "gaudi2": CacheScales(number_format("E4M3", "gaudi2")),
    "e5m2": CacheScales(number_format("E5M2"), torch.tensor([2**-14]), torch.tensor([2**-13])),
    "dynamic by a rule": CacheScales(FMT, rule=ScaleRule(PerToken(), "maxabs", "identity")),
}
KINDS = {
    "dynamic": lambda: hf.DynamicLayer(),
    "sliding": lambda: hf.DynamicSlidingWindowLayer(sliding_window=WINDOW),
    "static": lambda: hf.StaticLayer(max_cache_len=LENGTH),
    "static sliding": lambda: hf.StaticSlidingWindowLayer(max_cache_len=LENGTH, sliding_window=WINDOW),
    "indexed": lambda: hf.DynamicIndexedLayer(),
    "static indexed": lambda: hf.StaticIndexedLayer(max_cache_len=LENGTH),
    "hybrid": lambda: hf.LinearAttentionAndFullAttentionLayer(),
    "hybrid sliding": lambda: hf.LinearAttentionAndSlidingWindowAttentionLayer(sliding_window=WINDOW),
}


def rounded(x: torch.Tensor, scale: torch.Tensor | None, scales: CacheScales) -> torch.Tensor:
    """`x` on the FP8 grid, by plain torch in float64."""
    fmt = scales.fmt
    if scale is None:
        maxabs = x.double().abs().amax(-1, keepdim=True)
        if scales.rule is None:
            scale = torch.exp2(torch.ceil(torch.log2(maxabs / (fmt.full_scale / 2)))).float()
        else:
            scale = (maxabs.float() / fmt.full_scale).float()
    codes = (x.float() * (1 / scale)).clamp(-fmt.full_scale, fmt.full_scale).to(fmt.dtype)
    return (codes.float() * scale).to(x.dtype)


def states(length: int, batch: int = 2, dtype: torch.dtype = torch.bfloat16) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(batch, H, length, D).to(dtype), torch.randn(batch, H, length, D // 2).to(dtype)


class Pair:
    """An FP8 layer, and a plain one that is given what the first should hold."""

    def __init__(self, kind: str, scales: CacheScales):
        self.plain, self.fp8, self.scales = KINDS[kind](), fp8_layer(KINDS[kind](), scales), scales
        self.batch = 2

    def update(self, length: int) -> None:
        k, v = states(length, self.batch)
        found = self.fp8.update(k, v, kwargs={})
        expected = self.plain.update(rounded(k, self.scales.k, self.scales), rounded(v, self.scales.v, self.scales))
        for x, y in zip(found, expected, strict=True):
            assert isinstance(x, FP8Tensor) and x.dtype == y.dtype and x.codes.dtype == self.scales.fmt.dtype
            assert torch.equal(x.dequantize(), y)

    def do(self, action: str, *args) -> None:
        getattr(self.fp8, action)(*args)
        getattr(self.plain, action)(*args)

    def compare(self) -> None:
        for name in ("keys", "values"):
            x, y = getattr(self.fp8, name), getattr(self.plain, name)
            assert (x is None) == (y is None)
            if x is not None and y.numel():
                assert torch.equal(x.dequantize(), y)
        for action in ("get_seq_length", "get_max_length"):
            assert int(getattr(self.fp8, action)()) == int(getattr(self.plain, action)())
        assert self.fp8.get_mask_sizes(3) == self.plain.get_mask_sizes(3)
        assert self.fp8.is_initialized == self.plain.is_initialized
        assert self.fp8.is_sliding == self.plain.is_sliding


@pytest.mark.parametrize("scales", SCALES)
@pytest.mark.parametrize("kind", KINDS)
def test_prefill_and_decode(kind, scales):
    pair = Pair(kind, SCALES[scales])
    pair.compare()
    for length in (4, 1, 1, 3, 1, 1, 5):
        pair.update(length)
        pair.compare()
    pair.do("reset")
    pair.compare()
    pair.update(9)
    pair.compare()


ACTIONS = ["update", "decode", "reorder_cache", "batch_repeat_interleave", "batch_select_indices", "crop", "reset"]
GROWING = ["dynamic", "sliding", "indexed"]


@settings(max_examples=60)
@given(st.sampled_from(GROWING), st.sampled_from(["per head", "dynamic"]), st.booleans(), st.data())
def test_any_order_of_what_generation_does(kind, scales, records, data):
    pair = Pair(kind, SCALES[scales])
    if records and kind == "sliding":
        pair.do("activate_past_recording")
    for action in data.draw(st.lists(st.sampled_from(ACTIONS), max_size=8)):
        if action == "update":
            pair.update(data.draw(st.integers(1, 8)))
        elif action == "decode":
            pair.update(1)
        elif action == "reorder_cache" and pair.fp8.is_initialized:
            pair.do(action, torch.tensor(data.draw(st.permutations(range(pair.batch)))))
        elif action == "batch_repeat_interleave" and pair.batch <= 4 and pair.fp8.is_initialized:
            pair.do(action, 2)
            pair.batch *= 2
        elif action == "batch_select_indices" and pair.batch > 1 and pair.fp8.is_initialized:
            pair.do(action, torch.tensor([0]))
            pair.batch = 1
        elif action == "crop" and pair.fp8.is_initialized:
            # A window that does not record its past cannot be cropped, and transformers says so.
            full = kind == "sliding" and pair.plain.cumulative_length >= WINDOW
            if not full or records:
                pair.do(action, -data.draw(st.integers(0, min(2, pair.plain.keys.shape[-2] - 1))))
        elif action == "reset":
            pair.do(action)
            pair.batch = 2
        pair.compare()


@pytest.mark.parametrize("scales", ["per head", "dynamic"])
def test_static_layers_crop_and_reorder(scales):
    pair = Pair("static", SCALES[scales])
    pair.update(10)
    if hasattr(pair.plain, "crop"):
        pair.do("crop", -4)
    else:  # in older releases of transformers
        with pytest.raises(AttributeError, match="crop"):
            pair.fp8.crop(-4)
    pair.update(2)
    pair.do("reorder_cache", torch.tensor([1, 1]))
    pair.update(1)
    pair.compare()


@pytest.mark.parametrize("kind", ["dynamic", "sliding", "static", "static sliding"])
@pytest.mark.parametrize("scales", ["per head", "dynamic"])
def test_a_filled_layer_is_quantized_as_it_stands(kind, scales):
    scales = SCALES[scales]
    pair = Pair(kind, scales)
    filled = KINDS[kind]()
    for length in (4, 1, 5):
        k, v = states(length)
        filled.update(k, v)
        pair.plain.update(rounded(k, scales.k, scales), rounded(v, scales.v, scales))
    pair.fp8 = fp8_layer(filled, scales)
    if scales.is_dynamic and kind.startswith("static"):  # where nothing is stored yet, zeros have the scale of zeros
        assert torch.equal(pair.fp8.keys.dequantize(), pair.plain.keys)
    pair.compare()
    pair.update(1)
    pair.compare()
    pair.do("reorder_cache", torch.tensor([1, 0]))
    pair.compare()


@pytest.mark.parametrize("kind", ["dynamic", "sliding", "hybrid"])
def test_where_the_device_has_all_operators_the_fp8_dtype_is_stored(kind, monkeypatch):
    """As on Gaudi; of these kinds a CPU has them too, and what is read is what bytes give."""
    for scales in (SCALES["per head"], SCALES["dynamic"]):
        found = []
        for types in ((), ("cpu",)):
            monkeypatch.setattr("optimum_fp8.cache.layers.STORES_FP8", types)
            torch.manual_seed(0)
            layer = fp8_layer(KINDS[kind](), scales)
            for length in (7, 1, 1):
                layer.update(*states(length))
            assert layer.inner.keys.dtype == layer.inner.values.dtype == (FMT.dtype if types else torch.uint8)
            held = fp8_layer(KINDS[kind]())
            held.update(*states(5))
            held.set_scales(scales)
            assert held.inner.keys.dtype == layer.inner.keys.dtype
            for each in (layer, held):
                each.reorder_cache(torch.tensor([1, 0]))
            found += [layer.keys.dequantize(), layer.values.dequantize(), held.keys.dequantize()]
        assert all(torch.equal(*pair) for pair in zip(found[:3], found[3:], strict=True))


def test_half_the_bytes_at_32k_tokens():
    def held(layer) -> int:
        tensors = [layer.keys, layer.values]
        if isinstance(layer, FP8Layer):
            tensors = [layer.inner.keys, layer.inner.values]
            tensors += [] if layer.scale_layer is None else [layer.scale_layer.keys, layer.scale_layer.values]
        return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())

    heads, size, length = 2, 128, 32768
    k = torch.zeros(1, heads, length, size, dtype=torch.bfloat16)
    token = k[:, :, :1]
    for kind in (lambda: hf.DynamicLayer(), lambda: hf.StaticLayer(max_cache_len=length + 1)):
        plain = kind()
        static, dynamic = fp8_layer(kind(), SCALES["per tensor"]), fp8_layer(kind(), SCALES["dynamic"])
        for layer in (plain, static, dynamic):
            layer.update(k, k)
            layer.update(token, token)
        assert held(plain) == 2 * 2 * heads * (length + 1) * size
        assert held(static) * 2 == held(plain)
        assert held(dynamic) == held(static) + 2 * 4 * heads * (length + 1)  # float32 scales: 3 % at this size


def test_the_window_bounds_what_is_held():
    layer = fp8_layer(KINDS["sliding"](), SCALES["dynamic"])
    layer.update(*states(20))
    for _ in range(3):
        layer.update(*states(1))
    assert layer.inner.keys.shape[-2] == layer.scale_layer.keys.shape[-2] == WINDOW - 1


@pytest.mark.parametrize("scales", ["per head", "dynamic"])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_copies_are_independent(kind, scales):
    layer = fp8_layer(KINDS[kind](), SCALES[scales])
    layer.update(*states(4))
    before = layer.keys.dequantize()
    other = copy.deepcopy(layer)
    other.update(*states(3))
    assert int(other.get_seq_length()) == 7 and int(layer.get_seq_length()) == 4
    assert torch.equal(layer.keys.dequantize(), before)


def test_offloading_moves_codes_and_scales():
    layer = fp8_layer(KINDS["dynamic"](), SCALES["dynamic"])
    layer.prefetch()  # nothing is held yet
    layer.update(*states(4))
    tensors = lambda: [x for held in (layer.inner, layer.scale_layer) for x in (held.keys, held.values)]  # noqa: E731
    layer.inner.device = layer.scale_layer.device = torch.device("meta")  # stands in for an accelerator
    layer.prefetch()
    assert {t.device.type for t in tensors()} == {"meta"}
    layer.inner.keys, layer.inner.values = (torch.zeros(1, H, 4, D, dtype=torch.uint8) for _ in range(2))
    layer.scale_layer.keys, layer.scale_layer.values = (torch.ones(1, H, 4, 1) for _ in range(2))
    layer.offload()
    assert {t.device.type for t in tensors()} == {"cpu"}


@pytest.mark.parametrize("scales", SCALES)
@pytest.mark.parametrize("kind", ["dynamic", "sliding", "static", "static sliding", "indexed"])
def test_what_was_offloaded_and_fetched_is_what_it_was(kind, scales, elsewhere):
    pair = Pair(kind, SCALES[scales])
    pair.fp8.offload()  # nothing is held yet
    pair.fp8.prefetch()
    for length in (4, 1, 3, 1):
        pair.update(length)
        lengths, masks = int(pair.fp8.get_seq_length()), pair.fp8.get_mask_sizes(1)
        pair.fp8.offload()
        assert pair.fp8.keys.device.type == pair.fp8.keys.scale.device.type == "meta"
        assert len(elsewhere) == (4 if SCALES[scales].is_dynamic else 2)
        assert (int(pair.fp8.get_seq_length()), pair.fp8.get_mask_sizes(1)) == (lengths, masks)
        pair.fp8.prefetch()
        assert not elsewhere
        pair.compare()


def test_offloading_without_a_cuda_device_is_refused():
    message = "DynamicCache is to offload its layers.*no CUDA device: leave out"
    with pytest.raises(FP8NotAvailableError, match=message):
        convert_cache(hf.DynamicCache(offloading=True), [SCALES["dynamic"]] * 2)
    with pytest.raises(FP8NotAvailableError, match="FP8Cache is to offload"):
        FP8Cache([SCALES["dynamic"]], offloading=True)


def test_early_initialization_allocates_fp8():
    cache = hf.Cache(layers=[fp8_layer(KINDS["static"](), SCALES["dynamic"])])
    cache.early_initialization(batch_size=2, num_heads=H, head_dim=D, dtype=torch.bfloat16, device="cpu")
    layer = cache.layers[0]
    assert layer.inner.keys.dtype == torch.uint8 and layer.inner.keys.shape == (2, H, LENGTH, D)
    assert layer.keys.dtype == torch.bfloat16 and layer.keys.dequantize().abs().sum() == 0
    assert layer.scale_layer.keys.shape == (2, H, LENGTH, 1) and not layer.written


def test_a_layer_initialized_in_high_precision_becomes_fp8_storage():
    plain = KINDS["static"]()
    plain.lazy_initialization(*states(0))
    layer = fp8_layer(plain, SCALES["per head"])
    assert layer.inner.keys.dtype == torch.uint8 and not layer.written
    layer.set_scales(SCALES["dynamic"])
    assert layer.inner is plain and layer.keys.dtype == torch.bfloat16 and layer.keys.scale.shape == (2, H, LENGTH, 1)
    layer.update(*states(2))
    assert layer.written and int(layer.get_seq_length()) == 2


def test_a_layer_without_scales_keeps_high_precision_until_they_come():
    layer, expected = fp8_layer(KINDS["static"]()), KINDS["static"]()
    k, v = states(3)
    for found, own in zip(layer.update(k, v), expected.update(k, v), strict=True):
        assert type(found) is torch.Tensor and torch.equal(found, own)
    assert type(layer.keys) is torch.Tensor and not layer.written
    layer.set_scales(SCALES["per head"])
    assert layer.inner.keys.dtype == torch.uint8
    assert torch.equal(layer.keys.dequantize(), rounded(expected.keys, PER_HEAD, SCALES["per head"]))
    layer.reset()
    layer.set_scales(None)
    assert layer.inner.keys.dtype == torch.bfloat16 and layer.inner.keys.abs().sum() == 0
    assert torch.equal(layer.update(k, v)[0][:, :, :3], k)


def test_what_a_kind_has_besides_is_the_layers_own():
    layer = fp8_layer(KINDS["sliding"](), SCALES["dynamic"])
    assert layer.sliding_window == WINDOW and layer.record_past is False
    layer.activate_past_recording()
    assert layer.inner.record_past and layer.scale_layer.record_past
    layer.note = 1  # as models do with positions of an indexer
    assert layer.inner.note == 1
    with pytest.raises(AttributeError, match="batch_size"):
        _ = layer.batch_size
    indexed = fp8_layer(KINDS["indexed"](), SCALES["dynamic"])
    keys = torch.randn(2, 3, 4)
    assert torch.equal(indexed.update_indexer(keys), keys) and torch.equal(indexed.inner.indexer_keys, keys)


def test_linear_attention_states_stay_in_high_precision():
    layer = fp8_layer(KINDS["hybrid"](), SCALES["per head"])
    cache = hf.Cache(layers=[layer])
    state = torch.randn(2, 5, 4)
    assert torch.equal(cache.update_conv_state(state, 0), state)
    assert torch.equal(cache.update_recurrent_state(state, 0), state)
    cache.update(*states(3), 0)
    assert cache.is_linear == hf.Cache(layers=[KINDS["hybrid"]()]).is_linear
    assert cache.has_previous_state(0) and cache.get_seq_length() == 3
    assert torch.equal(cache.layers[0].conv_states[0], state)
    cache.reorder_cache(torch.tensor([1, 0]))
    assert torch.equal(cache.layers[0].conv_states[0], state[[1, 0]])


def test_saturates_instead_of_overflowing():
    layer = fp8_layer(KINDS["dynamic"](), SCALES["per tensor"])
    huge = torch.full((1, 1, 1, 8), 1e4)
    keys, values = layer.update(huge, -huge)
    assert (keys == 448 * 0.02).all() and torch.allclose(values, torch.full((), -448 * 0.01))


def test_zero_tokens_have_a_sound_dynamic_scale():
    layer = fp8_layer(KINDS["dynamic"](), SCALES["dynamic"])
    keys, _ = layer.update(torch.zeros(1, 2, 3, 8), torch.zeros(1, 2, 3, 0))
    assert torch.isfinite(keys.scale).all() and (keys.scale > 0).all() and (keys == 0).all()


@pytest.mark.parametrize(
    "k, v, message",
    [
        (torch.ones(1), None, "both static or both dynamic"),
        (torch.ones(3), torch.ones(1), r"k is torch.float32 \(3,\): expected.*\(heads, 1, 1\)"),
        (torch.ones(1), torch.ones(1, dtype=torch.bfloat16), "v is torch.bfloat16"),
        (torch.ones(2, 3, 1, 1), torch.ones(1), "expected torch.float32 of shape"),
    ],
)
def test_scales_no_cache_can_have(k, v, message):
    with pytest.raises(FP8ScaleError, match=message):
        CacheScales(FMT, k, v)


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf")])
def test_unsound_scales_are_refused(bad):
    CacheScales(FMT, torch.ones(1), torch.ones(1)).check("layer 3")
    with pytest.raises(FP8ScaleError, match="layer 3: the v scale of its cache.*expected finite values above 0"):
        CacheScales(FMT, torch.ones(1), torch.tensor([bad])).check("layer 3")


def test_a_layer_that_quantizes_by_itself_is_refused():
    with pytest.raises(FP8ConfigError, match="Fp8QuantizedLayer.*cache_implementation='quantized'"):
        refusal(hf.Fp8QuantizedLayer())


@pytest.mark.parametrize("scales", ["per tensor", "dynamic"])
def test_a_gradient_through_cached_keys_is_refused_when_it_is_asked_for(scales):
    given = torch.randn(1, H, 3, D, requires_grad=True)
    keys, values = FP8Layer(hf.DynamicLayer(), SCALES[scales]).update(given, given)
    with torch.no_grad():
        again, _ = FP8Layer(hf.DynamicLayer(), SCALES[scales]).update(given, given)
    assert torch.equal(keys, again.dequantize())
    with pytest.raises(FP8NotAvailableError, match="no gradient through keys and values of an FP8 cache.*use_cache"):
        (keys * values).sum().backward()
