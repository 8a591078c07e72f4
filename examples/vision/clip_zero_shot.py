"""Classify images by what sentences say of them, with a CLIP in FP8: calibrated on images and texts together.

python examples/vision/clip_zero_shot.py                                          # the embedded model, on digits
python examples/vision/clip_zero_shot.py --model openai/clip-vit-base-patch32 --prompt "a photo of the number {}"
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from transformers import AutoModel, AutoProcessor, PreTrainedModel, ProcessorMixin

from optimum_fp8 import FP8Config, quantization_report

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

from digits import load_split  # noqa: E402
from loading import pretrained  # noqa: E402

TINY_CLIP = HERE / "tiny_clip"
PROMPT = "a photo of the digit {}"
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def batches(processor: ProcessorMixin, images: list, texts: list[str], size: int = 32) -> list[dict]:
    """Images in batches, each with all of the texts."""
    parts = [images[first : first + size] for first in range(0, len(images), size)]
    return [dict(processor(text=texts, images=part, padding=True, return_tensors="pt")) for part in parts]


@torch.no_grad()
def predictions(model: PreTrainedModel, inputs: list[dict]) -> torch.Tensor:
    """The text that fits each image best, `[n]`."""
    found = []
    for batch in inputs:
        cast = {name: value.to(model.dtype) if value.is_floating_point() else value for name, value in batch.items()}
        found.append(model(**cast).logits_per_image.argmax(-1))
    return torch.cat(found)


def main(arguments: list[str] | None = None) -> dict[str, torch.Tensor]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(TINY_CLIP), help="a folder, or the name of a CLIP on the Hub")
    parser.add_argument("--prompt", default=PROMPT, help="a sentence with {} for the number")
    parser.add_argument("--images", type=int, default=360, help="how many of the held-out images")
    options = parser.parse_args(arguments)

    if "{}" not in options.prompt:
        parser.error(f"--prompt has no {{}} where the number goes: {options.prompt!r}")
    processor = pretrained(AutoProcessor, options.model, backend="pil")
    texts = [options.prompt.format(number) for number in NUMBERS]
    images, labels = load_split("heldout")
    inputs, truth = batches(processor, images[: options.images], texts), torch.tensor(labels[: options.images])
    calibration = batches(processor, load_split("train")[0][:128], texts)

    models = {
        "bfloat16": pretrained(AutoModel, options.model, dtype=torch.bfloat16),
        "FP8": pretrained(
            AutoModel, options.model, dtype=torch.bfloat16, quantization_config=FP8Config(dataset=calibration)
        ),
    }
    found = {name: predictions(model, inputs) for name, model in models.items()}
    print(f"\n{len(truth)} images, 10 sentences\n{'model':10} {'accuracy':>9} {'agree':>8}")
    for name, classes in found.items():
        agree = (classes == found["bfloat16"]).float().mean()
        print(f"{name:10} {(classes == truth).float().mean():9.2%} {agree:8.2%}")
    print(f"\n{str(quantization_report(models['FP8'])).splitlines()[0]}")
    return found | {"truth": truth}


if __name__ == "__main__":
    main()
