"""The attention function itself: what it does for a module with this plan or that, whatever the model."""

from __future__ import annotations

import copy
from collections import Counter
from functools import partial

import pytest
import torch
from torch import nn

from optimum_fp8 import FP8Config, ops
from optimum_fp8.attention import AttentionPlan, attention_forward, plan_of, scales_of, set_plan, set_scales
from optimum_fp8.cache import FP8Tensor
from optimum_fp8.errors import FP8NotAvailableError
from optimum_fp8.formats import number_format
from optimum_fp8.scales import activation_scale
from optimum_fp8.selection import scheme_for

FMT = number_format()
ONE = {key: torch.tensor([0.03]) for key in ("q_scale", "k_scale", "v_scale", "output_scale")}
ONE["p_scale"] = torch.tensor([1 / 64])
FINE = {key: torch.tensor([2.0**-6]) for key in ("q_scale", "k_scale", "v_scale")}


def inputs(dtype=torch.float32):
    return [torch.randn(2, heads, length, 8).to(dtype) for heads, length in ((4, 5), (2, 7), (2, 7))]


def module(scheme=None, scales=ONE, **options):
    made = nn.Identity().eval()
    set_scales(made, scales)
    set_plan(made, AttentionPlan(scheme, **options))
    return made


def calls_of(owner):
    """Calls by operator, on whatever backend they ran."""
    counts = Counter()
    for (op, _), count in plan_of(owner).record.kernels.items():
        counts[op] += count
    return counts


def scheme(rounds=True, dataflow="fused", **options):
    keys = {"activation_scheme": "static", "attention": rounds, "kv_cache": True, "target": "cpu"} | options
    if dataflow == "qdq":
        return scheme_for(FP8Config(use_qdq=True, **keys))
    return scheme_for(FP8Config(attention_dataflow=dataflow, **keys))


def expected(q, k, v, scales, mask=None, **options):
    options = {"scaling": 8**-0.5, "dtype": FMT.dtype, "full_scale": 448.0} | options
    keys = ("q_scale", "k_scale", "v_scale", "p_scale", "output_scale")
    return ops.attention(q, k, v, *(scales.get(key) for key in keys), mask, **options)


@pytest.mark.core
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_without_a_plan_it_is_torchs_attention(dtype):
    q, k, v = inputs(dtype)
    output, weights = attention_forward(nn.Identity(), q, k, v, None)
    reference = nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2)
    torch.testing.assert_close(output, reference, atol=2e-2 if dtype == torch.bfloat16 else 1e-6, rtol=1e-2)
    assert weights.shape == (2, 4, 5, 7) and output.dtype == weights.dtype == dtype
    q.requires_grad_(True)
    attention_forward(nn.Identity(), q, k, v, None)[0].sum().backward()
    assert q.grad is not None


@pytest.mark.core
def test_it_observes_and_changes_nothing():
    seen, (q, k, v) = {}, inputs()
    watched = module(observe=lambda kind, x: seen.update({kind: x}), scales={})
    output, _ = attention_forward(watched, q, k, v, None)
    assert torch.equal(output, attention_forward(nn.Identity(), q, k, v, None)[0])
    assert seen["q"] is q and seen["k"] is k and seen["v"] is v and torch.equal(seen["output"], output.transpose(1, 2))


@pytest.mark.core
@pytest.mark.parametrize("dataflow", ["fused", "unfused", "qdq"])
def test_it_rounds_with_the_modules_scales(dataflow):
    q, k, v = inputs(torch.bfloat16)
    mask = torch.full((1, 1, 5, 7), float("-inf")).triu(3).bfloat16()
    output, weights = attention_forward(module(scheme(dataflow=dataflow)), q, k, v, mask)
    assert torch.equal(output, expected(q, k, v, ONE, mask, dataflow=dataflow)) and weights is None


@pytest.mark.parametrize("target, full_scale", [("gaudi2", 240.0), ("gaudi3", 448.0)])
@pytest.mark.parametrize("dataflow", ["fused", "unfused", "qdq"])
def test_on_gaudi_probabilities_are_rounded_once(dataflow, target, full_scale):
    q, k, v = inputs(torch.bfloat16)
    fine = ONE | {"p_scale": torch.tensor([1 / 256])}
    found, _ = attention_forward(module(scheme(dataflow=dataflow, target=target), fine), q, k, v, None)
    once = dataflow if dataflow == "qdq" else f"{dataflow}_gaudi"
    assert torch.equal(found, expected(q, k, v, fine, dataflow=once, full_scale=full_scale))
    twice = expected(q, k, v, fine, dataflow=dataflow, full_scale=full_scale)
    assert torch.equal(found, twice) == (dataflow != "unfused"), "these operands tell them apart"


@pytest.mark.core
def test_it_takes_the_codes_of_a_cache():
    q, k, v = inputs(torch.bfloat16)
    cached = [
        FP8Tensor(ops.cast_to_fp8(x, ONE[key], FMT.dtype, 448.0), ONE[key], torch.bfloat16)
        for x, key in ((k, "k_scale"), (v, "v_scale"))
    ]
    both, _ = attention_forward(module(scheme()), q, *cached, None)
    assert torch.equal(both, expected(q, k, v, ONE))
    assert torch.equal(attention_forward(module(scheme()), q, cached[0], v, None)[0], both)
    only_cache = module(scheme(rounds=False), {})
    found, _ = attention_forward(only_cache, q, *cached, None)
    values = [x.dequantize() for x in cached]
    reference, _ = attention_forward(nn.Identity(), q, *values, None)
    torch.testing.assert_close(found, reference, atol=2e-2, rtol=2e-2)
    assert calls_of(only_cache) == {"attention": 1}
    assert torch.equal(attention_forward(nn.Identity(), q, *cached, None)[0], reference)
    attention_forward(only_cache, q, k, v, None)  # nothing is FP8: nothing to do
    assert calls_of(only_cache) == {"attention": 1}


def test_dynamic_scales_are_those_of_each_token_and_head():
    rule = {"activation_scheme": "dynamic", "scale_method": "maxabs_arbitrary", "hp_dtype": "fp32"}
    q, k, v = inputs()
    found, _ = attention_forward(module(scheme(**rule), {"p_scale": ONE["p_scale"]}), q, k, v, None)
    own = {f"{n}_scale": x.abs().amax(-1, keepdim=True) / 224 for n, x in (("q", q), ("k", k), ("v", v))}
    torch.testing.assert_close(found, expected(q, k, v, own | {"p_scale": ONE["p_scale"]}), atol=1e-5, rtol=1e-5)


@pytest.mark.core
def test_everything_models_pass():
    q, k, v = inputs()
    bias, mask, sinks = torch.randn(1, 4, 5, 7), torch.zeros(2, 1, 5, 7), torch.randn(4)
    mask[1, :, :, :3] = torch.finfo(torch.float32).min
    options = {"scaling": 0.2, "softcap": 2.0}
    both, _ = attention_forward(module(scheme()), q, k, v, mask, position_bias=bias, s_aux=sinks, **options)
    assert torch.equal(both, expected(q, k, v, ONE, bias + mask, sinks=sinks, **options))
    boolean, _ = attention_forward(module(scheme()), q, k, v, mask == 0, position_bias=bias, s_aux=sinks, **options)
    assert torch.equal(boolean, both)
    owner = module(scheme())
    owner.sinks = nn.Parameter(sinks)
    ignored = {"use_cache": True, "sliding_window": 3, "is_causal": True, "cu_seq_lens_q": None, "position_ids": None}
    assert torch.equal(attention_forward(owner, q, k, v, mask, position_bias=bias, **options, **ignored)[0], both)
    plain = {**options, "sinks": sinks.view(1, 4, 1, 1).expand(2, 4, 5, 1), "position_bias": bias}
    high, _ = attention_forward(nn.Identity(), q, k, v, mask, **plain)
    unrounded = expected(q, k, v, {}, bias + mask, sinks=sinks, **options)
    torch.testing.assert_close(high, unrounded, atol=1e-5, rtol=1e-5)


def test_static_masks_may_be_longer_than_the_keys():
    q, k, v = inputs()
    mask = torch.zeros(1, 1, 5, 20)
    mask[..., 2] = torch.finfo(torch.float32).min
    for each in (nn.Identity(), module(scheme())):
        found = [attention_forward(each, q, k, v, part)[0] for part in (mask, mask[..., :7])]
        assert torch.equal(*found)


@pytest.mark.parametrize("backoff, errors", [(0.25, (0.01, 0.2)), (1.0, (0.0, 0.01))])
def test_attention_that_is_spread_wide_needs_small_probabilities(backoff, errors):
    """Over so many positions most probabilities are below what the default scale tells from 0."""
    q, k, v = torch.randn(1, 2, 1, 64), torch.randn(1, 2, 32768, 64), torch.randn(1, 2, 32768, 64) + 0.5
    p_scale = activation_scale(1.0, method="maxabs_hw", backoff=backoff)
    found, _ = attention_forward(module(scheme(), {"p_scale": p_scale} | FINE), q, k, v, None)
    expected, _ = attention_forward(nn.Identity(), q, k, v, None)
    plain, _ = attention_forward(module(scheme(), FINE), q, k, v, None)
    assert errors[0] <= (found - plain).norm() / expected.norm() < errors[1]


@pytest.mark.core
def test_probabilities_only_when_they_are_asked_for():
    q, k, v = inputs()
    owner = module(scheme())
    assert attention_forward(owner, q, k, v, None)[1] is None
    output, weights = attention_forward(owner, q, k, v, None, output_attentions=True)
    assert torch.equal(output, expected(q, k, v, ONE))
    high = attention_forward(nn.Identity(), q, k, v, None)[1]
    assert weights.shape == high.shape and (weights - high).abs().max() < 0.05
    assert calls_of(owner) == {"attention": 2, "attention_weights": 1}
    assert sum(plan_of(owner).record.fallbacks.values()) == 1


def test_dropout_and_blocks_of_an_unknown_kind_are_refused():
    q, k, v = inputs()
    owner = module(scheme())
    attention_forward(owner, q, k, v, None, dropout=0.3)  # models pass it in evaluation too
    with pytest.raises(FP8NotAvailableError, match="dropout"):
        attention_forward(owner.train(), q, k, v, None, dropout=0.3)
    with pytest.raises(FP8NotAvailableError, match="'block_indices', .* expected an indexer"):
        attention_forward(owner, q, k, v, None, block_indices=torch.zeros(1))


@pytest.mark.core
def test_scales_survive_casts_copies_and_are_dropped():
    owner = nn.Sequential(module(scheme()), nn.Linear(2, 2))
    inner = owner[0]
    arbitrary = torch.tensor([0.123456789])
    set_scales(inner, ONE | {"q_scale": arbitrary})
    owner.half().bfloat16()
    assert owner[1].weight.dtype == torch.bfloat16
    assert torch.equal(scales_of(inner)["q_scale"], arbitrary) and not scales_of(inner)["q_scale"].requires_grad
    twin = copy.deepcopy(owner).double()
    assert torch.equal(scales_of(twin[0])["q_scale"], arbitrary)
    assert scales_of(twin[0])["q_scale"] is not scales_of(inner)["q_scale"]
    assert plan_of(twin[0]).record is not plan_of(inner).record
    assert set(owner.state_dict()) == {f"0.fp8_scales.{key}" for key in ONE} | {"1.weight", "1.bias"}
    owner.to_empty(device="meta")
    assert scales_of(inner)["q_scale"].is_meta and scales_of(inner)["q_scale"].dtype == torch.float32
    set_scales(inner, {})
    assert scales_of(inner) == {} and not list(inner.parameters()) and not list(inner.children())


@pytest.mark.parametrize("wrong", [0.0, -1.0, float("nan"), float("inf")])
def test_unsound_scales_are_not_loaded(wrong):
    owner = module(scheme())
    state = owner.state_dict() | {"fp8_scales.k_scale": torch.tensor([wrong])}
    with pytest.raises(RuntimeError, match=r"fp8_scales\.k_scale is .* expected finite values above 0"):
        owner.load_state_dict(state)
    assert torch.equal(scales_of(owner)["k_scale"], ONE["k_scale"])


def test_a_forward_hook_may_be_a_partial():
    """Observers of a copied model are those of the copy."""
    seen = []
    owner = module(observe=partial(lambda log, kind, x: log.append(kind), seen), scales={})
    twin = copy.deepcopy(owner)
    attention_forward(twin, *inputs(), None)
    assert seen == [] and plan_of(twin).observe.args[0] == ["q", "k", "v", "output"]
