"""Train the two tiny image classifiers, `tiny_vit/` and `tiny_resnet/`, on scikit-learn's handwritten digits.

A fifth of the images is held out; the accuracy printed at the end is that of the saved models on those.

    python examples/vision/train_digits.py --output examples/vision
"""

import argparse
import sys
from pathlib import Path

import torch
from digits import load_split
from PIL import Image
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
)

sys.path.insert(0, str(Path(__file__).parents[1]))
from training import fit

LABELS = {digit: str(digit) for digit in range(10)}
NAMES = {"id2label": LABELS, "label2id": {name: digit for digit, name in LABELS.items()}}
SIDE = 32


def build_vit() -> ViTForImageClassification:
    """Return a vision transformer over 16 patches of 8 x 8 pixels, each two by two pixels of the original."""
    config = ViTConfig(
        image_size=SIDE,
        patch_size=8,
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=512,
        **NAMES,
    )
    return ViTForImageClassification(config)


def build_resnet() -> ResNetForImageClassification:
    """Return a residual network of basic blocks; its stem alone shrinks the image to a quarter of its side."""
    config = ResNetConfig(embedding_size=32, hidden_sizes=[32, 64, 128], depths=[1, 1, 1], layer_type="basic", **NAMES)
    return ResNetForImageClassification(config)


def augment(image: Image.Image) -> Image.Image:
    """Turn an image a little and shift it by less than one pixel of the original, over the black background."""
    angle, x, y = torch.empty(3).uniform_(-1, 1).tolist()
    large = image.resize((SIDE, SIDE), Image.Resampling.BILINEAR)
    return large.rotate(8 * angle, Image.Resampling.BILINEAR, translate=(3 * x, 3 * y))


def train(model: PreTrainedModel, processor: ViTImageProcessorPil, steps: int, batch_size: int) -> None:
    """Train on freshly augmented images."""
    images, labels = load_split("train")
    targets = torch.tensor(labels)

    def loss() -> torch.Tensor:
        rows = torch.randint(len(images), (batch_size,))
        pixels = processor([augment(images[i]) for i in rows], return_tensors="pt").pixel_values
        return model(pixel_values=pixels, labels=targets[rows]).loss

    fit(model, loss, steps, warmup=max(1, steps // 20))


@torch.inference_mode()
def accuracy(directory: Path, part: str) -> float:
    """Return the accuracy of a saved model, in the number format that it was saved in."""
    images, labels = load_split(part)
    processor = AutoImageProcessor.from_pretrained(directory, backend="pil")
    model = AutoModelForImageClassification.from_pretrained(directory, dtype="auto").eval()
    pixels = processor(images, return_tensors="pt").pixel_values.to(model.dtype)
    return (model(pixels).logits.argmax(-1) == torch.tensor(labels)).double().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent)
    parser.add_argument("--steps", type=int, default=3500)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    # An 8 x 8 image is enlarged to SIDE; the mean and deviation put the pixels between -1 and 1.
    processor = ViTImageProcessorPil(
        size={"height": SIDE, "width": SIDE}, image_mean=[0.5, 0.5, 0.5], image_std=[0.5, 0.5, 0.5]
    )
    # BatchNorm keeps running statistics, which lose too much in bf16, and the ResNet is small enough for fp32.
    for name, build, dtype in (
        ("tiny_vit", build_vit, torch.bfloat16),
        ("tiny_resnet", build_resnet, torch.float32),
    ):
        torch.manual_seed(args.seed)
        model = build()
        train(model, processor, args.steps, args.batch_size)
        directory = args.output / name
        model.to(dtype).save_pretrained(directory)
        processor.save_pretrained(directory)
        parts = {part: accuracy(directory, part) for part in ("train", "heldout")}
        print(name, {part: f"{value:.4f}" for part, value in parts.items()}, dtype)


if __name__ == "__main__":
    main()
