"""Accuracy on the embedded, really trained models, against their full precision and an independent oracle."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import ml_dtypes
import numpy
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoImageProcessor, AutoModelForCausalLM, AutoModelForImageClassification, AutoTokenizer

from optimum_fp8 import FP8Config, convert, prepare
from optimum_fp8.modules import fp8_modules

EXAMPLES = Path(__file__).parents[2] / "examples"
TINY_LM = EXAMPLES / "llm" / "tiny_lm"
WINDOW = 256

sys.path.insert(0, str(EXAMPLES / "vision"))

from digits import load_split  # noqa: E402


@pytest.fixture(scope="module")
def heldout() -> torch.Tensor:
    text = (TINY_LM / "heldout.txt").read_text(encoding="utf-8")
    ids = AutoTokenizer.from_pretrained(TINY_LM)(text, return_tensors="pt", verbose=False).input_ids[0]
    return ids[: len(ids) // WINDOW * WINDOW].view(-1, WINDOW)


@torch.no_grad()
def perplexity(model, ids: torch.Tensor) -> float:
    total = 0.0
    for part in ids.split(8):
        logits = model(part).logits[:, :-1].double()
        total += F.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten(), reduction="sum").item()
    return math.exp(total / ids[:, 1:].numel())


def fake_quantize(x: torch.Tensor, scale: float) -> torch.Tensor:
    """Round to E4M3 and back in float64, by ml_dtypes alone."""
    scaled = numpy.clip(x.double().numpy() / scale, -448, 448)
    return torch.from_numpy(scaled.astype(ml_dtypes.float8_e4m3fn).astype(numpy.float64) * scale)


def independent_model(quantized):
    """The original model in float64, its Linears fed with fake-quantized weights and inputs of the same scales."""
    model = AutoModelForCausalLM.from_pretrained(TINY_LM, dtype=torch.float64)
    for name, fp8 in fp8_modules(quantized).items():
        linear = model.get_submodule(name)
        linear.weight.data = fake_quantize(linear.weight.data, fp8.weight_scale.item())
        scale = fp8.input_scale.item()
        linear.register_forward_pre_hook(lambda module, args, scale=scale: (fake_quantize(args[0], scale),))
    return model


@pytest.mark.slow
def test_the_embedded_model_is_trained(heldout):
    assert perplexity(AutoModelForCausalLM.from_pretrained(TINY_LM), heldout) < 25  # of 2048 tokens


@pytest.mark.slow
def test_static_e4m3_with_default_settings(heldout):
    base = perplexity(AutoModelForCausalLM.from_pretrained(TINY_LM), heldout)
    config = FP8Config(dataset=str(TINY_LM / "calibration.txt"))
    quantized = AutoModelForCausalLM.from_pretrained(TINY_LM, quantization_config=config)
    found, oracle = perplexity(quantized, heldout), perplexity(independent_model(quantized), heldout)
    print(f"bf16 {base:.4f}, FP8 {found:.4f} ({found / base:.5f}), float64 oracle {oracle:.4f} ({oracle / base:.5f})")
    assert found <= 1.01 * base
    assert found - base <= 1.2 * (oracle - base)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["gaudi2", "gaudi3"])
def test_gaudi_numerics_are_as_good(heldout, target):
    part = heldout[::4]
    base = perplexity(AutoModelForCausalLM.from_pretrained(TINY_LM), part)
    config = FP8Config(dataset=str(TINY_LM / "calibration.txt"), target=target)
    quantized = AutoModelForCausalLM.from_pretrained(TINY_LM, quantization_config=config)
    assert perplexity(quantized, part) <= 1.01 * base


def vit(pixels: torch.Tensor, folder: Path):
    config = FP8Config(dataset=({"pixel_values": part} for part in pixels[:128].split(16)))
    return AutoModelForImageClassification.from_pretrained(folder, quantization_config=config)


def resnet(pixels: torch.Tensor, folder: Path):
    model = prepare(AutoModelForImageClassification.from_pretrained(folder), FP8Config(fp8_config="E4M3"))
    with torch.no_grad():
        for part in pixels[:128].split(16):
            model(part)
    return convert(model)


@pytest.mark.parametrize(("name", "quantize"), [("tiny_vit", vit), ("tiny_resnet", resnet)])
def test_image_classifiers_agree_with_full_precision(name, quantize):
    folder = EXAMPLES / "vision" / name
    images, labels = load_split("all")
    pixels = AutoImageProcessor.from_pretrained(folder, backend="pil")(images=images, return_tensors="pt").pixel_values
    original = AutoModelForImageClassification.from_pretrained(folder)
    quantized = quantize(pixels, folder)
    with torch.no_grad():
        before, after = (
            torch.cat([model(part.to(model.dtype)).logits.argmax(-1) for part in pixels.split(256)])
            for model in (original, quantized)
        )
    assert (before == torch.tensor(labels)).float().mean() >= 0.97
    assert (before == after).float().mean() >= 0.995
