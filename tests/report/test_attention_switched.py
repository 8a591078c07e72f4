"""What the report says of attention once its model runs another attention implementation."""

from __future__ import annotations

import copy

import pytest
import torch
from attention_models import FAMILIES

from optimum_fp8 import FP8Config, convert, dequantize, prepare, quantization_report

NAME = "optimum_fp8"


def converted(family, **options):
    model = FAMILIES[family].make()
    prepare(model, FP8Config(attention=True, **options))
    forward(model, family)
    return convert(model)


@torch.no_grad()
def forward(model, family):
    return model(**FAMILIES[family].inputs)


def rows(model):
    return quantization_report(model).attention


def made(rows):
    return sum(sum(row.kernels.values()) for row in rows)


@pytest.mark.parametrize("name", ["sdpa", "eager"])
@pytest.mark.parametrize("how", ["method", "config"])
def test_another_implementation_is_what_the_report_tells(name, how):
    model, plain = converted("llama"), FAMILIES["llama"].make()
    assert all(row.quantized and row.reason == "selected" for row in rows(model))
    if how == "method":
        model.set_attn_implementation(name)
    else:
        model.config._attn_implementation = name
    forward(model, "llama")
    calls = made(rows(model))
    for row in rows(model):
        assert not row.quantized and row.activations == "" and f"attn_implementation={name!r}" in row.reason
        assert row.scheme == "" or "softmax" not in row.scheme
    text = str(quantization_report(model))
    assert "0 of 2 attention modules in FP8" in text and f"attn_implementation={name!r} runs" in text
    forward(model, "llama")
    assert made(rows(model)) == calls  # none of ours ran
    assert plain.config._attn_implementation != NAME

    model.set_attn_implementation(NAME)
    forward(model, "llama")
    assert all(row.quantized and row.reason == "selected" for row in rows(model)) and made(rows(model)) > calls


def test_the_cache_stays_in_fp8():
    model = converted("qwen3", kv_cache=True)
    model.set_attn_implementation("sdpa")
    forward(model, "qwen3")
    for row in rows(model):
        assert row.quantized and row.activations == "cache only" and row.cached > 0
        assert "attn_implementation='sdpa'" in row.reason and "softmax" not in row.scheme
    assert "attn_implementation='sdpa' runs" in str(quantization_report(model))


def test_a_part_of_a_composite_model():
    model = converted("clip")
    model.set_attn_implementation({"text_config": "sdpa"})
    forward(model, "clip")
    by_part = {row.name.partition(".")[0]: row.quantized for row in rows(model)}
    assert by_part == {"text_model": False, "vision_model": True}
    model.vision_model.set_attn_implementation("eager")
    assert not any(row.quantized for row in rows(model))


def test_a_copy_is_reported_by_itself():
    model = converted("llama")
    other = copy.deepcopy(model)
    other.set_attn_implementation("sdpa")
    assert all(row.quantized for row in rows(model)) and not any(row.quantized for row in rows(other))


def test_modules_that_multiply_themselves_are_not_concerned():
    model = converted("bloom")
    model.config._attn_implementation = "sdpa"
    before = made(rows(model))
    forward(model, "bloom")
    assert all(row.quantized for row in rows(model)) and made(rows(model)) > before


def test_while_measuring():
    model = prepare(FAMILIES["llama"].make(), FP8Config(attention=True))
    assert {row.reason for row in rows(model)} == {"measuring"}
    model.set_attn_implementation("sdpa")
    assert all("attn_implementation='sdpa'" in row.reason for row in rows(model))


def test_a_saved_model_has_its_attention_in_fp8_again(tmp_path):
    model = converted("llama")
    expected = forward(model, "llama").logits
    model.set_attn_implementation("sdpa")
    model.save_pretrained(tmp_path)
    again = FAMILIES["llama"].model_class.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert all(row.quantized for row in rows(again))
    assert torch.equal(forward(again, "llama").logits, expected)


def test_dequantizing_keeps_what_the_user_chose():
    model = converted("llama")
    model.set_attn_implementation("eager")
    assert dequantize(model).config._attn_implementation == "eager"
    model = converted("llama")
    assert dequantize(model).config._attn_implementation == "sdpa"
