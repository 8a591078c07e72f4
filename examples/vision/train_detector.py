"""Train the tiny detector, `tiny_detr/`, on synthetic pictures of squares, circles and triangles.

python examples/vision/train_detector.py --output examples/vision/tiny_detr
"""

import argparse
import sys
from pathlib import Path

import numpy
import torch
from shapes import KINDS, SIDE, Scene, scene
from transformers import RTDetrConfig, RTDetrForObjectDetection, RTDetrImageProcessorPil, RTDetrResNetConfig

sys.path.insert(0, str(Path(__file__).parents[1]))
from training import fit

LABELS = dict(enumerate(KINDS))


def build() -> RTDetrForObjectDetection:
    """Return an RT-DETR: a ResNet of basic blocks, the hybrid encoder, and a decoder of two layers for 20 queries."""
    backbone = RTDetrResNetConfig(
        embedding_size=16,
        hidden_sizes=[16, 32, 48, 64],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_indices=[2, 3, 4],
    )
    config = RTDetrConfig(
        backbone_config=backbone,
        freeze_backbone_batch_norms=False,
        encoder_in_channels=[32, 48, 64],
        encoder_hidden_dim=64,
        encoder_ffn_dim=128,
        encoder_attention_heads=4,
        hidden_expansion=0.5,
        d_model=64,
        decoder_in_channels=[64, 64, 64],
        decoder_ffn_dim=128,
        decoder_layers=2,
        decoder_attention_heads=4,
        num_queries=20,
        num_denoising=12,
        id2label=LABELS,
        label2id={name: kind for kind, name in LABELS.items()},
    )
    return RTDetrForObjectDetection(config)


def targets(pictures: list[Scene]) -> list[dict[str, torch.Tensor]]:
    """What the loss takes: centre, width and height of each box, in parts of the picture, and its class."""
    found = []
    for picture in pictures:
        boxes = torch.tensor(picture.boxes / SIDE, dtype=torch.float32)
        low, high = boxes[:, :2], boxes[:, 2:]
        places, kinds = torch.cat([(low + high) / 2, high - low], 1), torch.tensor(picture.kinds)
        found.append({"boxes": places, "class_labels": kinds})
    return found


def train(
    model: RTDetrForObjectDetection, processor: RTDetrImageProcessorPil, steps: int, batch_size: int, seed: int
) -> None:
    """Train on pictures that are drawn anew for each batch."""
    random = numpy.random.default_rng(seed)

    def loss() -> torch.Tensor:
        pictures = [scene(random) for _ in range(batch_size)]
        pixels = processor(images=[picture.image for picture in pictures], return_tensors="pt").pixel_values
        return model(pixel_values=pixels, labels=targets(pictures)).loss

    fit(model, loss, steps, warmup=100, learning_rate=2e-3, weight_decay=1e-4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "tiny_detr")
    parser.add_argument("--steps", type=int, default=2200)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    processor = RTDetrImageProcessorPil(size={"height": SIDE, "width": SIDE})
    model = build()
    train(model, processor, args.steps, args.batch_size, args.seed)
    model.to(torch.bfloat16).save_pretrained(args.output)
    processor.save_pretrained(args.output)


if __name__ == "__main__":
    main()
