"""Entries of a configuration that do nothing are named in a warning; those that do something are not."""

import logging

import pytest
from tiny_models import tiny_gpt2, tiny_llama
from torch import nn

from optimum_fp8 import FP8Config
from optimum_fp8.selection import select

HEAD = "lm_head (kept by default: head, tied or float32); quantize_lm_head=True lifts"


@pytest.fixture
def warnings(caplog):
    """What selecting from a model warns of."""

    def warnings(model, **options):
        with caplog.at_level(logging.WARNING, "optimum_fp8"):
            select(model, FP8Config(target="cpu", **options))
        return [record.getMessage() for record in caplog.records]

    return warnings


@pytest.mark.core
@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"overrides": {"lm_head": {"fp8_config": "E5M2"}}}, ["overrides 'lm_head' does nothing", HEAD]),
        (
            {"overrides": {"up_proj": {"use_qdq": True}}, "blocklist": {"names": ["mlp"]}},
            ["overrides 'up_proj' does nothing", "up_proj (blocklist name 'mlp')"],
        ),
        (
            {"overrides": {"self_attn$": {"use_qdq": True}}},
            ["overrides 'self_attn$' does nothing", "not asked for by the configuration"],
        ),
        (
            {"scale_method": {"default": "maxabs_hw", "nodes": {"lm_head": "maxabs_pow2"}}},
            ["scale_method['nodes'] 'lm_head' does nothing", HEAD],
        ),
        ({"allowlist": {"names": ["lm_head", "mlp"]}}, ["allowlist name 'lm_head' does nothing", HEAD]),
        (
            {"allowlist": {"names": ["input_layernorm", "mlp"]}},
            ["allowlist name 'input_layernorm' does nothing: what it matches is no kind of module that is quantized"],
        ),
        (
            {"allowlist": {"names": ["embed_tokens", "mlp"]}},
            ["allowlist name 'embed_tokens' does nothing", "not asked for by the configuration"],
        ),
        ({"allowlist": {"types": ["Embedding", "Linear"]}}, ["allowlist type 'Embedding' does nothing"]),
    ],
    ids=[
        "head",
        "blocklist",
        "attention",
        "method",
        "allowlist head",
        "allowlist no candidate",
        "not asked for",
        "type",
    ],
)
def test_entries_that_do_nothing_are_named(warnings, options, parts):
    (message,) = warnings(tiny_llama(), **options)
    assert all(part in message for part in parts), message


@pytest.mark.parametrize(
    "options",
    [
        {"overrides": {"lm_head": {"fp8_config": "E5M2"}}, "quantize_lm_head": True},
        {"overrides": {"lm_head|mlp": {"fp8_config": "E5M2"}}},
        {"overrides": {"self_attn$": {"attention": True}}},
        {"allowlist": {"names": ["mlp"]}},
        {"allowlist": {"types": ["Linear", "Conv2d", "torch.nn.Conv2d"]}},
        {"blocklist": {"names": ["lm_head", "mlp"]}},
        {"modules_to_not_convert": ["lm_head"]},
        {"scale_method": {"default": "maxabs_hw", "layers": {"0": "maxabs_pow2"}}},
    ],
    ids=str,
)
def test_entries_that_do_what_they_say_are_not(warnings, options):
    assert warnings(tiny_llama(), **options) == []


def test_a_type_of_which_none_is_selected(warnings):
    net = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Bilinear(2, 2, 1)})
    (message,) = warnings(net, allowlist={"types": ["Bilinear", "Linear"]})
    assert "allowlist type 'Bilinear' does nothing" in message


def test_a_tied_head_of_another_family(warnings):
    (message,) = warnings(tiny_gpt2(), overrides={"lm_head": {"activation_scheme": "weight_only"}})
    assert HEAD in message
