"""FP8 attention and caches in many model families, against the models' own eager attention."""

from __future__ import annotations

import copy

import pytest
import torch
from attention_models import FAMILIES, all_attention_scales

from optimum_fp8 import FP8Config, convert, dequantize, prepare, quantization_report

# Layers stay in high precision: what differs is attention's doing.
NO_LAYERS = {"allowlist": {"names": [r"\bnothing but one layer\b"]}}


@torch.no_grad()
def output(model, family, **options):
    """What a model returns for real positions: rows of padding attend to nothing, and mean nothing."""
    inputs = {
        key: value.to(model.dtype) if value.is_floating_point() else value for key, value in family.inputs.items()
    }
    result = model(**inputs, **options)[0]
    mask = inputs.get("attention_mask")
    if mask is not None and result.shape[:2] == mask.shape:
        return result[mask.bool()]
    return result


def error(found, expected):
    return ((found - expected).float().norm() / expected.float().norm()).item()


def eager(family):
    model = family.make()
    if model._can_set_attn_implementation():
        model.set_attn_implementation("eager")
    return model


def config(family, **options):
    """FP8 attention, and one Linear, because something must be selected."""
    linear = next(
        name
        for name, module in family.make().named_modules()
        if name.endswith(("mlp.up_proj", "fc1", "wi", "h_to_4h", "dense_h_to_4h", "intermediate.dense", "c_fc", "Wi"))
        or name.endswith(("fc_in", "ffn.up_proj", "mlp.fc1", "shared_experts.up_proj", "layers.0.self_attn.o_proj"))
    )
    return FP8Config(allowlist={"names": [f"^{linear}$".replace(".", r"\.")]}, attention=True, **options)


@pytest.mark.core
@pytest.mark.parametrize("name", FAMILIES)
def test_observed_it_computes_what_eager_attention_does(name):
    family = FAMILIES[name]
    expected = output(eager(family), family)
    model = prepare(family.make(), config(family, kv_cache=family.cached > 0))
    assert error(output(model, family), expected) < 2e-6
    report = quantization_report(model)
    assert [row.activations for row in report.attention] == ["measuring"] * family.ours


@pytest.mark.core
@pytest.mark.parametrize("name", FAMILIES)
def test_in_fp8_it_stays_close_and_everything_runs_there(name):
    family = FAMILIES[name]
    expected = output(eager(family), family)
    model = prepare(family.make(), config(family, kv_cache=family.cached > 0))
    output(model, family)
    convert(model)
    found = output(model, family)
    report = quantization_report(model)
    assert len(report.attention) == family.ours and all(row.quantized for row in report.attention), report
    assert all(row.kernels and not row.fallbacks for row in report.attention), report
    assert sum(row.cached > 0 for row in report.attention) == family.cached, report
    assert 1e-4 < error(found, expected) < 0.2
    kinds = {key for _, key, _ in all_attention_scales(model)}
    assert {"q_scale", "k_scale", "v_scale", "p_scale"} <= kinds
    twin = copy.deepcopy(model)
    assert torch.equal(output(twin, family), found)
    dequantize(model)
    assert not list(all_attention_scales(model))


CACHING = [name for name, family in FAMILIES.items() if family.cached]


@pytest.mark.core
@pytest.mark.parametrize("scheme", ["static", pytest.param("dynamic", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", CACHING)
def test_decoding_over_the_cache_is_decoding_without_one(name, scheme):
    """With scales that do not change, codes that are cached are the codes that would be made again."""
    family = FAMILIES[name]
    model = prepare(family.make(), config(family, kv_cache=True, activation_scheme="static"))
    if scheme == "dynamic":
        model = family.make()
    else:
        output(model, family)
    convert(model, config(family, kv_cache=True, activation_scheme="dynamic") if scheme == "dynamic" else None)
    inputs = {key: value for key, value in family.inputs.items() if key != "attention_mask"}
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    generated = [model.generate(**inputs, **options, use_cache=use_cache) for use_cache in (True, False)]
    report = quantization_report(model)
    assert all(row.kernels and not row.fallbacks for row in report.attention), report
    assert sum(row.cached > 0 for row in report.attention) == family.cached
    if name != "deepseek_v3, latents":  # only what is cached is rounded there
        assert torch.equal(*generated)
