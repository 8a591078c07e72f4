"""A trained adapter, merged into the tiny language model in FP8, does what it was trained for."""

from __future__ import annotations

import sys
from pathlib import Path

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from optimum_fp8 import FP8Config, merge_lora, quantize_files

LLM = Path(__file__).parents[2] / "examples" / "llm"
sys.path.insert(0, str(LLM))

from train_tiny_lora import perplexity, train  # noqa: E402

BASE, ADAPTER = LLM / "tiny_lm", LLM / "tiny_lora"


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()


@pytest.mark.slow
def test_perplexity_is_that_of_the_adapter(tmp_path):
    quantize_files(BASE, tmp_path / "fp8", FP8Config.preset("FP8_DYNAMIC"))
    adapted = perplexity(peft.PeftModel.from_pretrained(load(BASE), ADAPTER).eval())
    assert adapted < 0.6 * perplexity(load(tmp_path / "fp8"))
    reports = {}
    for name, options in {"with": {"original": BASE}, "without": {}}.items():
        reports[name] = merge_lora(tmp_path / "fp8", ADAPTER, tmp_path / name, trained_on="base", **options)
        assert perplexity(load(tmp_path / name)) == pytest.approx(adapted, rel=0.01)
    assert reports["with"].mean(lambda each: each.error) == pytest.approx(0.0262, abs=2e-4)
    assert reports["with"].mean(lambda each: each.otherwise) == pytest.approx(0.0363, abs=2e-4)


@pytest.mark.slow
def test_one_that_was_trained_on_dequantized_weights(tmp_path):
    quantize_files(BASE, tmp_path / "fp8", FP8Config.preset("FP8_DYNAMIC"))
    trained = train(tmp_path / "fp8", steps=30)
    trained.save_pretrained(tmp_path / "adapter")
    report = merge_lora(tmp_path / "fp8", tmp_path / "adapter", tmp_path / "merged", trained_on="fp8")
    assert perplexity(load(tmp_path / "merged")) == pytest.approx(perplexity(trained), rel=0.01)
    assert report.mean(lambda each: each.error) < 0.03 and "rounded to FP8 again" in report.loss
