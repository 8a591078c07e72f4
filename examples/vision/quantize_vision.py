"""Quantize image classifiers to FP8: a vision transformer while it is loaded, a ResNet by prepare and convert.

python examples/vision/quantize_vision.py                          # the embedded models, on handwritten digits
python examples/vision/quantize_vision.py --model google/vit-base-patch16-224 --images photos/    # CLASS/*.jpg
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification, PreTrainedModel

from optimum_fp8 import FP8Config, convert, prepare, quantization_report

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

from digits import load_split  # noqa: E402
from loading import picture, pictures_in, pretrained  # noqa: E402

Quantize = Callable[[str, torch.Tensor], PreTrainedModel]


@torch.no_grad()
def predictions(model: PreTrainedModel, pixels: torch.Tensor) -> torch.Tensor:
    """The class of each image, `[n]`."""
    return torch.cat([model(part.to(model.dtype)).logits.argmax(-1) for part in pixels.split(128)])


def pixel_values(name: str, images: list) -> torch.Tensor:
    processor = pretrained(AutoImageProcessor, name, backend="pil")
    return processor(images=images, return_tensors="pt").pixel_values


def quantize_vit(name: str, calibration: torch.Tensor) -> PreTrainedModel:
    """Measure and quantize in the call that loads the model."""
    config = FP8Config(dataset=({"pixel_values": part} for part in calibration.split(16)))
    return pretrained(AutoModelForImageClassification, name, quantization_config=config)


@torch.no_grad()
def quantize_resnet(name: str, calibration: torch.Tensor) -> PreTrainedModel:
    """The same by hand: prepare, your own calibration loop, convert."""
    model = pretrained(AutoModelForImageClassification, name)
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


def labelled(folder: Path, model: PreTrainedModel) -> tuple[list[Image.Image], list[int]]:
    """Pictures in folders that are named as the model's classes, and those classes."""
    images, labels = [], []
    for path in pictures_in(folder):
        if path.parent.name not in model.config.label2id:
            known = sorted(map(str, model.config.label2id))
            shown = ", ".join(known[:6]) + (", …" if len(known) > 6 else "")
            raise SystemExit(f"{path}: the model has no class {path.parent.name!r}, expected a folder named {shown}")
        images.append(picture(path))
        labels.append(model.config.label2id[path.parent.name])
    return images, labels


def compare(name: str, quantize: Quantize, folder: Path | None) -> None:
    """Print a row of the table: of the model with this name, on digits or on the pictures in a folder."""
    original = pretrained(AutoModelForImageClassification, name)
    if folder is None:
        (images, labels), calibration = load_split("all"), load_split("train")[0][:128]
    else:
        images, labels = labelled(folder, original)
        calibration = images[::4][:128]
    truth, pixels = torch.tensor(labels), pixel_values(name, images)
    model = quantize(name, pixel_values(name, calibration))
    before, after = predictions(original, pixels), predictions(model, pixels)
    report = quantization_report(model)
    print(
        f"{Path(name).name:12} {f'{len(report.quantized)} of {len(report.modules)}':>11} "
        f"{weight_bytes(original) / 1e3:10.0f} {weight_bytes(model) / 1e3:9.0f} "
        f"{(before == truth).float().mean():9.2%} {(after == truth).float().mean():8.2%} "
        f"{(before == after).float().mean():8.2%}"
    )
    check_round_trip(model, pixels[:8])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder, or the name of an image classifier on the Hub")
    parser.add_argument("--images", type=Path, help="pictures in folders named as the model's classes")
    options = parser.parse_args(arguments)
    if (options.model is None) != (options.images is None):
        parser.error("--model and --images go together: the digits are what only the embedded models know")
    embedded = {str(HERE / "tiny_vit"): quantize_vit, str(HERE / "tiny_resnet"): quantize_resnet}
    print(
        f"\n{'model':12} {'FP8 modules':>11} {'KB before':>10} {'KB after':>9} {'accuracy':>9} {'FP8':>8} {'agree':>8}"
    )
    for name, quantize in ({options.model: quantize_vit} if options.model else embedded).items():
        compare(name, quantize, options.images)
    print("saved and reloaded: logits equal to the bit")


if __name__ == "__main__":
    main()
