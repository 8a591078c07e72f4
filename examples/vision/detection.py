"""Find objects in pictures with a detector in FP8, and draw its boxes beside those of the original.

python examples/vision/detection.py                                               # the embedded model, on shapes
python examples/vision/detection.py --model PekingU/rtdetr_r50vd --images photos/ # any detector, on your pictures
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from transformers import AutoImageProcessor, AutoModelForObjectDetection, PreTrainedModel

from optimum_fp8 import FP8Config, quantization_report

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

from average_precision import Boxes, mean_average_precision  # noqa: E402
from loading import picture, pictures_in, pretrained  # noqa: E402
from shapes import scenes  # noqa: E402

TINY_DETR = HERE / "tiny_detr"
STRICTER = [0.5 + 0.05 * step for step in range(10)]  # as COCO averages over
COLOURS = ("red", "lime", "deepskyblue", "gold", "magenta", "cyan", "orange")


def batches(processor: Any, images: Sequence[Image.Image], size: int = 16) -> list[dict[str, torch.Tensor]]:
    """What the model takes of images, in batches."""
    parts = [images[first : first + size] for first in range(0, len(images), size)]
    return [dict(processor(images=part, return_tensors="pt")) for part in parts]


@torch.no_grad()
def detect(model: PreTrainedModel, processor: Any, images: Sequence[Image.Image], sure: float = 0.0) -> list[Boxes]:
    """The boxes that a model finds in each image with a score above `sure`, in pixels of that image."""
    found: list[Boxes] = []
    for batch in batches(processor, images):
        given = {name: value.to(model.dtype) if value.is_floating_point() else value for name, value in batch.items()}
        output = model(**given)
        # In bfloat16 a pixel of a large picture would be rounded off.
        output.logits, output.pred_boxes = output.logits.float(), output.pred_boxes.float()
        sizes = [image.size[::-1] for image in images[len(found) : len(found) + len(output.logits)]]
        rows = processor.post_process_object_detection(output, threshold=sure, target_sizes=sizes)
        found += [Boxes(row["boxes"], row["labels"], row["scores"]) for row in rows]
    return found


def drawn(image: Image.Image, boxes: Boxes, names: dict[int, str], side: int = 192) -> Image.Image:
    """The image, its longer side so many pixels, with boxes and the names of their classes."""
    scale = side / max(image.size)
    copy = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.NEAREST)
    draw = ImageDraw.Draw(copy)
    for place, kind, score in zip(*boxes, strict=True):
        left, top, right, bottom = (place * scale).tolist()
        colour = COLOURS[int(kind) % len(COLOURS)]
        draw.rectangle([left, top, max(left, right), max(top, bottom)], outline=colour, width=2)
        label, corner = f"{names[int(kind)]} {score:.2f}", (max(left, 0), max(top, 0))
        draw.rectangle(draw.textbbox(corner, label), fill="black")
        draw.text(corner, label, fill=colour)
    return copy


def side_by_side(path: Path, *rows: Sequence[Image.Image]) -> None:
    """Save a picture with a row for each sequence of images."""
    widths = [max(images[column].width for images in rows) for column in range(len(rows[0]))]
    heights = [max(image.height for image in images) for images in rows]
    sheet = Image.new("RGB", (sum(widths), sum(heights)), "white")
    for row, images in enumerate(rows):
        for column, image in enumerate(images):
            sheet.paste(image, (sum(widths[:column]), sum(heights[:row])))
    sheet.save(path)


def arguments_of(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(TINY_DETR), help="a folder, or the name of a detector on the Hub")
    parser.add_argument("--images", type=Path, help="a folder of pictures; a quarter of them is calibrated on")
    parser.add_argument("--count", type=int, default=256, help="how many synthetic pictures are compared on")
    parser.add_argument("--sure", type=float, default=0.5, help="the least score of a box that is drawn or agreed on")
    parser.add_argument("--output", type=Path, default=Path("detection.png"), help="where the boxes are drawn")
    options = parser.parse_args(arguments)
    if options.images is None and options.model != str(TINY_DETR):
        parser.error("--model needs --images: the synthetic pictures show what only the embedded model knows")
    return options


def main(arguments: list[str] | None = None) -> dict[str, list[Boxes]]:
    options = arguments_of(arguments)
    truth = None
    if options.images is not None:
        images = [picture(path) for path in pictures_in(options.images)]
        calibration = images[::4]
        images = [image for number, image in enumerate(images) if number % 4] or images
    else:
        pictures = scenes(options.count, seed=2)
        images, calibration = [each.image for each in pictures], [each.image for each in scenes(128, seed=3)]
        truth = [
            Boxes(torch.tensor(each.boxes), torch.tensor(each.kinds), torch.ones(len(each.kinds))) for each in pictures
        ]

    processor = pretrained(AutoImageProcessor, options.model, backend="pil")
    config = FP8Config(dataset=batches(processor, calibration), attention=True)
    keys = {"dtype": torch.bfloat16}
    models = {
        "bfloat16": pretrained(AutoModelForObjectDetection, options.model, **keys),
        "FP8": pretrained(AutoModelForObjectDetection, options.model, **keys, quantization_config=config),
    }
    found = {name: detect(model, processor, images) for name, model in models.items()}
    sure = {
        name: [Boxes(*(each[boxes.scores >= options.sure] for each in boxes)) for boxes in rows]
        for name, rows in found.items()
    }
    if truth is not None:
        print(f"\n{len(images)} pictures, {sum(len(each.kinds) for each in truth)} objects")
        print(f"{'model':10} {'mAP@0.5':>8} {'mAP@0.5:0.95':>13} {'boxes':>6}")
        for name, rows in found.items():
            values = [mean_average_precision(rows, truth, thresholds) for thresholds in ([0.5], STRICTER)]
            print(f"{name:10} {values[0]:8.2%} {values[1]:13.2%} {sum(len(each.kinds) for each in sure[name]):6}")
    if any(len(each.kinds) for each in sure["bfloat16"]):
        agree = mean_average_precision(found["FP8"], sure["bfloat16"])
        print(f"\nFP8 beside the boxes of bfloat16 with a score of {options.sure} and more: mAP@0.5 {agree:.2%}")
    print(str(quantization_report(models["FP8"])).splitlines()[0])
    names, shown = models["FP8"].config.id2label, range(min(8, len(images)))
    side_by_side(options.output, *([drawn(images[row], rows[row], names) for row in shown] for rows in sure.values()))
    print(f"{options.output}: the boxes of bfloat16 above those of FP8")
    return found | ({"truth": truth} if truth is not None else {})


if __name__ == "__main__":
    main()
