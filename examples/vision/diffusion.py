"""Quantize the denoiser of a diffusion pipeline to FP8, and put its samples beside those of the original.

python examples/vision/diffusion.py
python examples/vision/diffusion.py --pipeline stabilityai/stable-diffusion-xl-base-1.0 --prompt "a red bicycle"
"""

from __future__ import annotations

import argparse
import copy
import inspect
import sys
from pathlib import Path
from typing import Any

import numpy
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification

from optimum_fp8 import FP8Config, convert, prepare, quantization_report

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

from digits import load_split  # noqa: E402
from loading import pretrained  # noqa: E402

TINY = HERE / "tiny_diffusion"
PARTS = ("unet", "transformer")


def samples(pipeline: Any, prompt: str, count: int, steps: int, seed: int) -> list[Image.Image]:
    """Images from the same noise for each call with the same seed."""
    takes = inspect.signature(pipeline.__call__).parameters
    inputs = {"prompt": [prompt] * count} if "prompt" in takes else {"batch_size": count}
    noise = torch.Generator().manual_seed(seed)
    return pipeline(**inputs, generator=noise, num_inference_steps=steps).images


def quantized(pipeline: Any, prompt: str, count: int, steps: int) -> Any:
    """The pipeline with its denoiser in FP8; a run of all steps tells the ranges."""
    name = next(name for name in PARTS if hasattr(pipeline, name))
    components = {**pipeline.components, name: copy.deepcopy(getattr(pipeline, name))}
    copied = type(pipeline)(**components)
    copied.set_progress_bar_config(disable=True)
    model = prepare(getattr(copied, name), FP8Config())
    samples(copied, prompt, count, steps, seed=1)
    report = quantization_report(convert(model))
    print(f"{len(report.quantized)} of {len(report.modules)} layers of `{name}` in FP8")
    return copied


@torch.no_grad()
def features(images: list[Image.Image]) -> tuple[torch.Tensor, torch.Tensor]:
    """What the classifier of `tiny_resnet` sees in images of digits: features `[n, 128]` and its confidence `[n]`."""
    processor = AutoImageProcessor.from_pretrained(HERE / "tiny_resnet", backend="pil")
    classifier = AutoModelForImageClassification.from_pretrained(HERE / "tiny_resnet")
    pixels = processor(images=[image.convert("RGB") for image in images], return_tensors="pt").pixel_values
    seen = classifier(pixels, output_hidden_states=True)
    return seen.hidden_states[-1].mean((2, 3)).double(), seen.logits.softmax(-1).amax(-1)


def frechet_distance(one: torch.Tensor, other: torch.Tensor) -> float:
    """The distance of two normal distributions, fitted to features `[n, size]`."""
    means, covariances = [x.mean(0) for x in (one, other)], [torch.cov(x.T) for x in (one, other)]
    eigenvalues = torch.linalg.eigvals(covariances[0] @ covariances[1]).real.clamp(min=0)
    distance = (means[0] - means[1]).square().sum() + covariances[0].trace() + covariances[1].trace()
    return float(distance - 2 * eigenvalues.sqrt().sum())


def side_by_side(path: Path, *rows: list[Image.Image], shown: int = 16) -> None:
    """Save a picture with a row for each list of images."""
    grid = [numpy.concatenate([numpy.asarray(image.convert("RGB")) for image in row[:shown]], axis=1) for row in rows]
    picture = Image.fromarray(numpy.concatenate(grid))
    scale = max(1, 512 // picture.width)
    picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST).save(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline", default=str(TINY), help="a folder, or a name on the Hub")
    parser.add_argument("--prompt", default="a photograph of a bicycle", help="for pipelines that take one")
    parser.add_argument("--samples", type=int, default=256, help="how many images each of both draws")
    parser.add_argument("--steps", type=int, default=20, help="of denoising")
    parser.add_argument("--output", type=Path, default=Path("samples.png"), help="where the first 16 of both are saved")
    args = parser.parse_args()

    # DDIMPipeline hands images to numpy, which has no bfloat16.
    dtype = torch.float32 if args.pipeline == str(TINY) else torch.bfloat16
    pipeline = pretrained(DiffusionPipeline, args.pipeline, dtype=dtype)
    if not any(hasattr(pipeline, name) for name in PARTS):
        raise SystemExit(f"{args.pipeline}: no {' or '.join(PARTS)} in a {type(pipeline).__name__}")
    pipeline.set_progress_bar_config(disable=True)
    in_fp8 = quantized(pipeline, args.prompt, min(args.samples, 16), args.steps)
    before = samples(pipeline, args.prompt, args.samples, args.steps, seed=0)
    after = samples(in_fp8, args.prompt, args.samples, args.steps, seed=0)

    pixels = [numpy.stack([numpy.asarray(image, dtype=float) for image in row]) for row in (before, after)]
    error = numpy.square(pixels[0] - pixels[1]).mean()
    original = str(dtype).removeprefix("torch.")
    print(f"FP8 beside {original}, from the same noise: PSNR {10 * numpy.log10(255**2 / error):.1f} dB")
    if args.pipeline == str(TINY):
        real, heldout = load_split("train")[0][:500], load_split("heldout")[0]
        expected = features(real)[0]
        print(f"\n{'samples':20} {'Fréchet distance':>16} {'confidence':>10}")
        for name, images in (("held-out digits", heldout), (original, before), ("FP8", after)):
            found, confidence = features(images)
            print(f"{name:20} {frechet_distance(found, expected):16.3f} {confidence.mean():10.2%}")
    side_by_side(args.output, before, after)
    print(f"{args.output}: the samples of {original} above those of FP8")


if __name__ == "__main__":
    main()
