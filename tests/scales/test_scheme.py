"""Schemes: scales by a scheme are those of the public functions, and a scheme is a value with a text."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, replace

import pytest
import torch
from scale_methods import FOR_ANY_SHAPE

from optimum_fp8 import ops
from optimum_fp8.errors import FP8ScaleError
from optimum_fp8.formats import HP_DTYPES, number_format
from optimum_fp8.scales import (
    SCALE_METHODS,
    PerGroup,
    PerToken,
    Scheme,
    activation_scale,
)

EVERYWHERE = [("cpu", "E4M3"), ("cuda", "E5M2"), ("gaudi2", "E4M3"), ("gaudi3", "E4M3"), ("gaudi3", "E5M2")]


def scheme(method="maxabs_hw", target="cpu", fp8="E4M3", activations="static", **options):
    rules = SCALE_METHODS[method]
    rule = rules.activation
    if activations == "dynamic":
        rule = rule.with_backoff(rules.dynamic_activation.backoff)
    fmt = number_format(fp8, target)
    return Scheme(fmt, rules.weight, rule, rule, rules.activation, activations=activations, **options)


@pytest.mark.core
@pytest.mark.parametrize("target, fp8", EVERYWHERE)
@pytest.mark.parametrize("hp_dtype", HP_DTYPES)
@pytest.mark.parametrize("method", FOR_ANY_SHAPE)
def test_static_scales_are_those_of_activation_scale(method, target, fp8, hp_dtype):
    ranges = torch.cat([torch.zeros(1), torch.logspace(-20, 20, 83, base=2)])
    options = {"method": method, "target": target, "fp8_config": fp8, "hp_dtype": hp_dtype}
    made = scheme(method, target, fp8, hp_dtype=HP_DTYPES[hp_dtype])
    assert torch.equal(made.static_scale(ranges), activation_scale(ranges, **options))
    assert torch.equal(made.static_scale(3.7), activation_scale(3.7, **options))


@pytest.mark.core
@pytest.mark.parametrize("target, fp8", EVERYWHERE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", [name for name, each in FOR_ANY_SHAPE.items() if each.activation.needs_range])
def test_dynamic_scales_are_those_of_activation_scale_for_the_same_range(method, target, fp8, dtype):
    made = scheme(method, target, fp8, "dynamic")
    x = (torch.randn(3, 7, 40) * torch.logspace(-3, 3, 7)[:, None]).to(dtype)
    x[1, 2] = 0
    by_token = isinstance(made.input.granularity, PerToken)
    maxabs = x.abs().amax(-1, keepdim=True) if by_token else x.abs().amax().reshape(1)
    expected = activation_scale(maxabs, method=method, target=target, fp8_config=fp8, dynamic=True)
    found = made.dynamic_scale(x)
    assert found.shape == expected.shape and torch.equal(found, expected)


@pytest.mark.parametrize("size", [32, 128])
def test_inputs_by_groups(size):
    made, x = scheme("maxabs_pcs_pow2", activations="dynamic"), torch.randn(2, 5, 200) * torch.logspace(-2, 2, 200)
    found = made.dynamic_scale(x, replace(made.input, granularity=PerGroup(size)))
    maxabs = torch.stack([part.abs().amax(-1) for part in x.split(size, dim=-1)], dim=-1)
    assert torch.equal(found, activation_scale(maxabs, method="maxabs_pcs_pow2"))
    codes = ops.cast_to_fp8(x, found, torch.float8_e4m3fn, 448.0)
    assert torch.allclose(ops.cast_from_fp8(codes, found, torch.float32), x, rtol=2**-4, atol=1e-4)


def test_another_rule_of_the_scheme_may_be_named():
    made = scheme()
    rule = made.input.with_backoff(1.0)
    assert made.static_scale(448.0, rule).tolist() == [1.0] and made.static_scale(448.0).tolist() == [4.0]


@pytest.mark.parametrize("maxabs", [-1.0, float("nan"), float("inf")])
def test_what_is_no_range_is_refused(maxabs):
    with pytest.raises(FP8ScaleError, match="is not a range"):
        scheme().static_scale(maxabs)


@pytest.mark.parametrize(
    "method, activations, needs",
    [
        ("maxabs_hw", "static", True),
        ("maxabs_hw", "dynamic", False),
        ("maxabs_hw", "weight_only", False),
        ("maxabs_hw_opt_weight", "static", True),
        ("unit_scale", "static", False),
        ("hw_aligned_single_scale", "static", False),
    ],
)
def test_ranges_are_needed_where_a_static_scale_depends_on_data(method, activations, needs):
    made = scheme(method, activations=activations)
    assert made.needs_ranges is needs
    assert (made.is_static, made.is_dynamic) == (activations == "static", activations == "dynamic")


def test_a_scheme_is_a_value():
    assert scheme() == scheme() and hash(scheme()) == hash(scheme())
    different = [
        scheme("maxabs_pow2"),
        scheme(target="gaudi2"),
        scheme(fp8="E5M2"),
        scheme(activations="dynamic"),
        scheme(arithmetic="qdq"),
        scheme(hp_dtype=torch.float32),
        scheme(rounds_attention=True),
        scheme(caches=True),
        scheme(dataflow="qdq"),
    ]
    assert len({scheme(), *different}) == 1 + len(different)
    used, fresh = scheme(), scheme()
    assert used.needs_ranges and used == fresh and hash(used) == hash(fresh), "what was looked up is no part of it"
    with pytest.raises(FrozenInstanceError):
        used.caches = True


@pytest.mark.parametrize(
    "made, text",
    [
        (
            scheme(),
            "E4M3 on cpu, weight per tensor maxabs hardware ×0.5, activations static per tensor maxabs hardware ×0.25",
        ),
        (
            scheme("maxabs_pcs_pow2", "gaudi3", "E5M2", "dynamic"),
            "E5M2 on gaudi3, weight per channel maxabs pow2 ×0.5, activations dynamic per token maxabs pow2 ×0.5",
        ),
        (
            scheme("unit_scale", activations="weight_only"),
            "E4M3 on cpu, weight per tensor unit, activations weight_only",
        ),
    ],
    ids=["static", "dynamic", "weight only"],
)
def test_how_reports_name_it(made, text):
    assert str(made) == text
