"""A model written around Gaudi's helper modules: measured, quantized, stored in FP8, saved and put back.

The oracle is the model in float64 with helpers of its own that round by ml_dtypes what they are given.
"""

from __future__ import annotations

import copy

import ml_dtypes
import numpy as np
import pytest
import torch
from attention_models import all_attention_scales
from gaudi_models import GaudiForCausalLM, KVCache, Softmax, gaudi_model, generate
from torch import nn

from optimum_fp8 import FP8Config, convert, dequantize, finalize_calibration, prepare, quantization_report
from optimum_fp8.attention import scales_of
from optimum_fp8.cache import FP8Tensor
from optimum_fp8.errors import FP8CheckpointError, FP8MeasurementError

pytestmark = pytest.mark.core
STEPS = 5
IDS = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(1))
FUSED, UNFUSED = {"names": ["matmul", "softmax"]}, {"names": ["fused_scaled"]}


def config(**options):
    options = {"attention": True, "kv_cache": True, "scale_method": "maxabs_arbitrary", "hp_dtype": "fp32"} | options
    blocklist = {"types": ["Linear"], "names": [], **options.pop("blocklist", UNFUSED)}
    return FP8Config(blocklist=blocklist, **options)


def converted(model=None, flash=False, **options):
    options = {"blocklist": FUSED if flash else UNFUSED} | options
    model = prepare(model or gaudi_model(), config(**options))
    generate(model, IDS, STEPS, flash=flash)
    return convert(model)


def codes(x: torch.Tensor, scale: torch.Tensor) -> np.ndarray:
    scaled = x.detach().double().numpy() / scale.double().numpy()
    return np.clip(scaled, -448, 448).astype(ml_dtypes.float8_e4m3fn)


def rounded(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(codes(x, scale).astype(np.float64)) * scale.double()


class RoundingMatmul(nn.Module):
    def __init__(self, scale):
        super().__init__()
        self.scale = scale

    def forward(self, x, y):
        return rounded(x, self.scale) @ y  # what a cache hands out is rounded already, once


class RoundingSoftmax(Softmax):
    def __init__(self, scale):
        super().__init__()
        self.scale = scale

    def forward(self, x, dim):
        return rounded(super().forward(x, dim), self.scale)


class RoundingSDPA(nn.Module):
    def __init__(self, q, p, output):
        super().__init__()
        self.q, self.p, self.output = q, p, output

    def forward(self, query, key, value, mask, dropout, is_causal, scaling, *rest):
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
        scores = rounded(query, self.q) @ key.transpose(-1, -2) * scaling + mask
        return rounded(rounded(scores.softmax(-1), self.p) @ value, self.output)


class RoundingCache(KVCache):
    def __init__(self, scale):
        super().__init__()
        self.scale = scale

    def allocate(self, inp_seq_len, dtype, device, shape):
        super().allocate(inp_seq_len, torch.float64, device, shape)

    def forward(self, cur, dim, idx):
        return super().forward(rounded(cur, self.scale), dim, idx)


def oracle(model) -> GaudiForCausalLM:
    """The original in float64, rounding with the scales of the converted `model`."""
    plain, s = gaudi_model().double(), {f"{name}.{key}": scale for name, key, scale in all_attention_scales(model)}
    for index, layer in enumerate(plain.layers):
        a, path = layer.self_attn, f"layers.{index}.self_attn"
        a.k_cache, a.v_cache = (RoundingCache(s[f"{path}.{kind}_cache.input_scale"]) for kind in "kv")
        if f"{path}.matmul_qk.q_scale" in s:
            a.matmul_qk = RoundingMatmul(s[f"{path}.matmul_qk.q_scale"])
            a.matmul_av = RoundingMatmul(s[f"{path}.matmul_av.q_scale"])
            a.softmax = RoundingSoftmax(s[f"{path}.softmax.p_scale"])
        else:
            name = "fused_scaled_dot_product_attention"
            own = [s[f"{path}.{name}.{key}_scale"] for key in ("q", "p", "output")]
            a.fused_scaled_dot_product_attention = RoundingSDPA(*own)
    return plain


@pytest.mark.parametrize("flash", [False, True], ids=["matmul and softmax", "fused"])
@pytest.mark.parametrize("granularity", ["tensor", "head"])
def test_it_rounds_where_its_helpers_say(flash, granularity):
    model = converted(flash=flash, attention_granularity=granularity)
    found, expected = (generate(m, IDS, STEPS, flash=flash).double() for m in (model, oracle(model)))
    error = (found - expected).abs() / expected.abs().mean()
    # A value on the edge between two codes may fall either way.
    assert error.median() < 1e-5 and error.max() < 0.05
    plain = generate(gaudi_model(), IDS, STEPS).double()
    assert (plain - expected).norm() / plain.norm() > 0.01  # rounding is to be seen


def written(model, **options) -> dict[str, list[torch.Tensor]]:
    """What is written to each cache while generating."""
    seen: dict[str, list[torch.Tensor]] = {}
    hooks = [
        module.register_forward_pre_hook(lambda module, args, name=name: seen.setdefault(name, []).append(args[0]))
        for name, module in model.named_modules()
        if isinstance(module, KVCache)
    ]
    generate(model, IDS, STEPS, **options)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("granularity", ["tensor", "head"])
def test_the_bytes_of_the_cache(granularity):
    """They are what ml_dtypes makes of what is written with the cache's scale: half of bfloat16, and nothing else."""
    model = converted(attention_granularity=granularity)
    for name, new in written(model).items():
        module = model.get_submodule(name)
        scale = scales_of(module)["input_scale"]
        assert scale.shape == ((1,) if granularity == "tensor" else (2, 1, 1)) and scale.dtype == torch.float32
        assert module.cache.dtype == torch.float8_e4m3fn and module.cache.element_size() == 1
        assert module.cache.shape == (2, 2, IDS.shape[1] + STEPS, 8)
        expected = codes(torch.cat(new, dim=2), scale).view(np.uint8)
        differing = (module.cache.view(torch.uint8).numpy() != expected).mean()
        assert differing < 2e-3  # 1 / s in float32 or x / s in float64: a few lie on an edge


def test_ranges_are_those_of_what_is_written_and_multiplied():
    model, plain = converted(), gaudi_model()
    for name, new in written(plain).items():
        maxabs = torch.cat(new, dim=2).abs().amax()
        assert torch.equal(scales_of(model.get_submodule(name))["input_scale"], (maxabs / (448 * 0.25)).view(1))
    one = torch.tensor([1 / (448 * 0.25)])
    assert all(torch.equal(scales_of(layer.self_attn.softmax)["p_scale"], one) for layer in model.layers)
    assert {key for _, key, _ in all_attention_scales(model)} == {"input_scale", "q_scale", "k_scale", "p_scale"}


def test_products_take_the_codes_of_the_cache_with_the_scale_they_were_written_with(monkeypatch):
    """Whatever their own scales are: there is nothing to unify, and nothing is dequantized."""
    model = converted()
    expected = generate(model, IDS, STEPS)
    for layer in model.layers:
        for product in (layer.self_attn.matmul_qk, layer.self_attn.matmul_av):
            scales_of(product)["k_scale"].fill_(123.0)
    monkeypatch.setattr(FP8Tensor, "dequantize", lambda self: 1 / 0)
    assert torch.equal(generate(model, IDS, STEPS), expected)


@pytest.mark.parametrize("flash", [False, True])
def test_a_cache_in_fp8_and_nothing_else(flash, monkeypatch):
    model = converted(flash=flash, attention=False)
    assert {key for _, key, _ in all_attention_scales(model)} == {"input_scale"}
    rows = {row.type: row for row in quantization_report(model).attention}
    assert rows["KVCache"].quantized and rows["Softmax"].reason == ("blocklist name 'softmax'" if flash else NO_CACHE)
    plain = gaudi_model()
    for layer, own in zip(plain.layers, model.layers, strict=True):
        a, b = layer.self_attn, own.self_attn
        a.k_cache, a.v_cache = (
            RoundingCache(scales_of(b.k_cache)["input_scale"]),
            RoundingCache(scales_of(b.v_cache)["input_scale"]),
        )
    expected = generate(plain.double(), IDS, STEPS, flash=flash)
    monkeypatch.setattr(FP8Tensor, "dequantize", lambda self: 1 / 0)
    error = (generate(model, IDS, STEPS, flash=flash) - expected).abs() / expected.abs().mean()
    assert error.median() < 1e-5 and error.max() < 0.05


NO_CACHE = "it writes to no cache"


def test_the_report_has_a_row_for_each_helper():
    model = converted(blocklist={"types": ["Linear", "Softmax"], "names": ["fused_scaled", "1.*matmul_av"]})
    generate(model, IDS, STEPS)
    rows = {row.name.removeprefix("layers."): row for row in quantization_report(model).attention}
    assert len(rows) == 12 and rows["0.self_attn.matmul_qk"].kernels and not rows["0.self_attn.matmul_qk"].fallbacks
    assert {name.rpartition(".")[2] for name, row in rows.items() if not row.quantized} == {
        "softmax",
        "fused_scaled_dot_product_attention",
        "matmul_av",
    }
    assert rows["0.self_attn.matmul_av"].quantized and rows["1.self_attn.matmul_av"].reason.startswith("blocklist name")
    assert rows["0.self_attn.k_cache"].cached == 1 and rows["0.self_attn.k_cache"].activations == "static"


def test_whoever_calls_the_model_may_keep_the_cache():
    """What `update` returns is handed to it again: FP8 from the first call on, the same numbers."""
    model = converted()
    expected = generate(model, IDS, STEPS)
    assert torch.equal(generate(model, IDS, STEPS, reuse_cache=False), expected)
    assert all(
        row.cached == 1 and not row.cache_refused for row in quantization_report(model).attention if "cache" in row.name
    )
    _, kept = model(IDS, [(torch.zeros(2, 2, 9, 8), torch.zeros(2, 2, 9, 8))] * 2)
    _, kept = model(IDS[:, :1], kept)
    assert all(isinstance(x, FP8Tensor) and x.codes.shape == (2, 2, 10, 8) for pair in kept for x in pair)


def test_storage_in_high_precision_is_rounded_into_and_reported():
    model = converted()
    cache = model.layers[0].self_attn.k_cache
    storage, new = torch.zeros(1, 2, 6, 8), torch.randn(1, 2, 3, 8)
    cache.update(storage, new, 2, torch.tensor([3]), 3)
    found = cache.update(storage, new[:, :, :1], 2, torch.tensor([4]), 3)
    expected = rounded(
        torch.cat([new, new[:, :, :1], torch.zeros(1, 2, 2, 8)], dim=2), scales_of(cache)["input_scale"]
    ).float()
    assert isinstance(found, FP8Tensor)
    torch.testing.assert_close(storage, expected)
    torch.testing.assert_close(found.dequantize(), expected)
    row = next(row for row in quantization_report(model).attention if row.name.endswith("0.self_attn.k_cache"))
    assert list(row.cache_refused.values()) == [1] and "in high precision" in next(iter(row.cache_refused))


def test_beams_are_reordered_as_codes():
    """The caches of sequences in another order, put in order, are the caches."""
    model, other = converted(), converted()
    generate(model, IDS, STEPS)
    generate(other, IDS.flip(0), STEPS)
    for a, b in zip(model.layers, other.layers, strict=True):
        b.self_attn.reorder_kv_cache(torch.tensor([1, 0]))
        for mine, its in ((a.self_attn.k_cache, b.self_attn.k_cache), (a.self_attn.v_cache, b.self_attn.v_cache)):
            assert torch.equal(mine.cache.view(torch.uint8), its.cache.view(torch.uint8))


def test_update_may_be_a_method_like_any_other():
    def update(self, prev, cur, dim, idx, inp_seq_len):
        return static(prev, cur, dim, idx, inp_seq_len)

    static, expected = KVCache.update, generate(converted(), IDS, STEPS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(KVCache, "update", update)
        model = converted()
        twin = copy.deepcopy(model)
        assert torch.equal(generate(model, IDS, STEPS), expected)
        generate(model, IDS.flip(0), STEPS)
        assert torch.equal(generate(twin, IDS, STEPS), expected)
        assert twin.layers[0].self_attn.k_cache.cache is not model.layers[0].self_attn.k_cache.cache


def test_copies_are_independent_and_dequantize_puts_all_back():
    model, plain = converted(), gaudi_model()
    expected = generate(model, IDS, STEPS)
    twin = copy.deepcopy(model)
    generate(model, IDS.flip(0), STEPS)
    assert torch.equal(generate(twin, IDS, STEPS), expected)
    cache = model.layers[0].self_attn.k_cache
    held = (cache.cache.float() * scales_of(cache)["input_scale"]).clone()
    dequantize(model)
    assert cache.cache.dtype == torch.float32 and torch.equal(cache.cache, held)
    assert not list(all_attention_scales(model))
    assert all(not {"update", "allocate", "forward"} & set(vars(module)) for module in model.modules())
    assert torch.equal(generate(model, IDS, STEPS), generate(plain, IDS, STEPS))
    assert torch.equal(generate(model, IDS, STEPS, flash=True), generate(plain, IDS, STEPS, flash=True))
    assert torch.equal(generate(twin, IDS, STEPS), expected)


@pytest.mark.parametrize("flash", [False, True])
def test_quantized_by_from_pretrained_saved_and_reloaded_to_the_bit(tmp_path, flash):
    gaudi_model().save_pretrained(tmp_path / "original")
    options = {"blocklist": FUSED if flash else UNFUSED}
    options["dataset"] = lambda model: generate(model, IDS, STEPS, flash=flash)  # these models decode their own way
    model = GaudiForCausalLM.from_pretrained(tmp_path / "original", quantization_config=config(**options))
    found = generate(model, IDS, STEPS, flash=flash)
    assert torch.equal(found, generate(converted(flash=flash), IDS, STEPS, flash=flash))
    model.save_pretrained(tmp_path / "fp8")
    again = GaudiForCausalLM.from_pretrained(tmp_path / "fp8")
    scales = {f"{name}.{key}": scale for name, key, scale in all_attention_scales(again)}
    assert all(torch.equal(scales[f"{name}.{key}"], scale) for name, key, scale in all_attention_scales(model))
    assert torch.equal(generate(again, IDS, STEPS, flash=flash), generate(model, IDS, STEPS, flash=flash))
    assert again.layers[0].self_attn.k_cache.cache.dtype == torch.float8_e4m3fn


def test_a_checkpoint_without_a_caches_scale_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    converted().save_pretrained(tmp_path)
    path, key = tmp_path / "model.safetensors", "layers.1.self_attn.v_cache.fp8_scales.input_scale"
    tensors = load_file(path)
    del tensors[key]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(FP8CheckpointError, match=key.replace(".", r"\.")):
        GaudiForCausalLM.from_pretrained(tmp_path)


def test_dynamic_scales_leave_these_caches_alone():
    model = gaudi_model()
    convert(model, config(activation_scheme="dynamic"))
    found, plain = generate(model, IDS, STEPS), generate(gaudi_model(), IDS, STEPS)
    assert 1e-3 < (found - plain).norm() / plain.norm() < 0.1
    rows = [row for row in quantization_report(model).attention if row.type == "KVCache"]
    assert {row.reason for row in rows} == {
        "activation_scheme='dynamic', but a KVCache has one static scale: calibrate it"
    }
    assert model.layers[0].self_attn.k_cache.cache.dtype == torch.float32
    automatic = convert(gaudi_model(), config(activation_scheme="auto"))
    assert torch.equal(generate(automatic, IDS, STEPS), found)


def test_fixed_scales_need_no_data():
    model = convert(gaudi_model(), config(scale_method="unit_scale"))
    assert all(torch.equal(scale, torch.ones(1)) for _, _, scale in all_attention_scales(model))
    assert torch.isfinite(generate(model, IDS, STEPS)).all() and scales_of(model.layers[0].self_attn.v_cache)


def test_a_helper_that_calibration_never_reached_is_named():
    model = prepare(gaudi_model(), config(blocklist={"names": []}))
    generate(model, IDS, STEPS)
    with pytest.raises(FP8MeasurementError, match=r"2 attention modules.*layers\.0\.self_attn\.fused_scaled"):
        convert(model)
    model = prepare(gaudi_model(), config())
    model(IDS)  # no cache
    with pytest.raises(FP8MeasurementError, match=r"4 attention modules.*layers\.0\.self_attn\.k_cache"):
        convert(model)


def test_measurements_serve_another_process(tmp_path):
    options = {"dump_stats_path": tmp_path / "stats"}
    model = prepare(gaudi_model(), config(**options))
    generate(model, IDS, STEPS)
    finalize_calibration(model)
    later = convert(gaudi_model(), config(mode="QUANTIZE", **options))
    assert torch.equal(generate(later, IDS, STEPS), generate(convert(model), IDS, STEPS))


def test_a_softmax_is_rounded_once_where_the_target_is_gaudi():
    """From float32, of its own input, as the operator on the card does; hooks leave with the conversion."""
    model = converted(gaudi_model().bfloat16(), target="gaudi3")
    softmax = model.layers[0].self_attn.softmax
    scale, x = scales_of(softmax)["p_scale"], (torch.randn(2, 3, 40) * 3).bfloat16()
    for factor in (None, 0.5, torch.tensor([0.5])):
        p = (x.double() * (1 if factor is None else 0.5)).softmax(-1)
        assert torch.equal(softmax(x, -1, factor).double(), rounded(p, scale).bfloat16().double())
        assert torch.equal(softmax(x, dim=-1, invAttnHead=factor), softmax(x, -1, factor))
    assert not torch.equal(softmax(x, -1).double(), rounded(x.softmax(-1), scale).bfloat16().double())
    other = converted(gaudi_model().bfloat16(), target="cuda").layers[0].self_attn.softmax
    s = scales_of(other)["p_scale"]
    assert torch.equal(other(x, -1).double(), rounded(x.softmax(-1), s).bfloat16().double())
    assert torch.equal(dequantize(model).layers[0].self_attn.softmax(x, -1), x.softmax(-1))
    assert not softmax._forward_hooks and not softmax._forward_hooks_with_kwargs


def test_a_softmax_without_a_product_beside_it_is_not_attention():
    class Router(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate, self.softmax = nn.Linear(4, 4), Softmax()

        def forward(self, x):
            return self.softmax(self.gate(x), dim=-1)

    net = prepare(nn.Sequential(Router()), FP8Config(attention=True))
    net(torch.randn(2, 4))
    assert not quantization_report(convert(net)).attention
