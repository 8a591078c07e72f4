"""Quantize image classifiers to FP8: a vision transformer while it is loaded, a ResNet by prepare and convert.

python examples/vision/quantize_vision.py
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoImageProcessor, AutoModelForImageClassification, PreTrainedModel

from optimum_fp8 import FP8Config, convert, prepare, quantization_report

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

from digits import load_split  # noqa: E402


@torch.no_grad()
def predictions(model: PreTrainedModel, pixels: torch.Tensor) -> torch.Tensor:
    """The class of each image, `[n]`."""
    return torch.cat([model(part.to(model.dtype)).logits.argmax(-1) for part in pixels.split(128)])


def pixel_values(folder: Path, images: list) -> torch.Tensor:
    processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    return processor(images=images, return_tensors="pt").pixel_values


def quantize_vit(folder: Path, calibration: torch.Tensor) -> PreTrainedModel:
    """Measure and quantize in the call that loads the model."""
    config = FP8Config(dataset=({"pixel_values": part} for part in calibration.split(16)))
    return AutoModelForImageClassification.from_pretrained(folder, quantization_config=config)


@torch.no_grad()
def quantize_resnet(folder: Path, calibration: torch.Tensor) -> PreTrainedModel:
    """The same by hand: prepare, your own calibration loop, convert."""
    model = AutoModelForImageClassification.from_pretrained(folder)
    model = prepare(model, FP8Config(fp8_config="E4M3"))
    for part in calibration.split(16):
        model(part)
    return convert(model)


def weight_bytes(model: PreTrainedModel) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def check_round_trip(model: PreTrainedModel, pixels: torch.Tensor) -> None:
    """Save, reload, and compare logits to the bit."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        reloaded = AutoModelForImageClassification.from_pretrained(folder)
        with torch.no_grad():
            same = torch.equal(model(pixels.to(model.dtype)).logits, reloaded(pixels.to(model.dtype)).logits)
    if not same:
        raise SystemExit("the reloaded model computes other logits")


def main() -> None:
    images, labels = load_split("all")
    truth, calibration_images = torch.tensor(labels), load_split("train")[0][:128]
    print(
        f"\n{'model':12} {'FP8 modules':>11} {'KB before':>10} {'KB after':>9} {'accuracy':>9} {'FP8':>8} {'agree':>8}"
    )
    for name, quantize in (("tiny_vit", quantize_vit), ("tiny_resnet", quantize_resnet)):
        pixels = pixel_values(HERE / name, images)
        original = AutoModelForImageClassification.from_pretrained(HERE / name)
        model = quantize(HERE / name, pixel_values(HERE / name, calibration_images))
        before, after = predictions(original, pixels), predictions(model, pixels)
        report = quantization_report(model)
        print(
            f"{name:12} {f'{len(report.quantized)} of {len(report.modules)}':>11} {weight_bytes(original) / 1e3:10.0f} "
            f"{weight_bytes(model) / 1e3:9.0f} {(before == truth).float().mean():9.2%} "
            f"{(after == truth).float().mean():8.2%} {(before == after).float().mean():8.2%}"
        )
        check_round_trip(model, pixels[:8])
    print("saved and reloaded: logits equal to the bit")


if __name__ == "__main__":
    main()
