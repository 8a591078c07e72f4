"""What folding batch norms is worth: outputs of the trained digits classifier, and the time of a ResNet-50.

python -m benchmarks.batch_norm
"""

from __future__ import annotations

import statistics
import sys
from functools import partial
from pathlib import Path

import torch
from transformers import AutoImageProcessor, AutoModelForImageClassification, ResNetConfig, ResNetForImageClassification

from optimum_fp8 import FP8Config, convert, prepare, quantization_report

from .timing import interleave, seconds_of_thread

VISION = Path(__file__).parents[1] / "examples" / "vision"
METHODS = ("maxabs_hw", "maxabs_arbitrary")
ROUNDS = 9


@torch.no_grad()
def digits() -> None:
    """Error of the logits, and accuracy, on held-out images; unfolded the first convolution stays in high precision."""
    sys.path.insert(0, str(VISION))
    from digits import load_split

    folder = VISION / "tiny_resnet"
    processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    (images, labels), (train, _) = load_split("heldout"), load_split("train")
    pixels, calibration = (processor(images=part, return_tensors="pt").pixel_values for part in (images, train[:128]))
    expected = AutoModelForImageClassification.from_pretrained(folder)(pixels).logits
    for method in METHODS:
        for fold, blocked in ((False, []), (True, []), (True, ["embedder"])):
            model = AutoModelForImageClassification.from_pretrained(folder)
            lists = {"names": blocked, "types": []}
            prepare(model, FP8Config(target="cpu", scale_method=method, fold_batch_norm=fold, blocklist=lists))
            model(calibration)
            found = convert(model)(pixels).logits
            error = ((found - expected).norm() / expected.norm()).item()
            accuracy = (found.argmax(-1) == torch.tensor(labels)).float().mean().item()
            count = len(quantization_report(model).quantized)
            print(f"{method:18} folded={fold!s:5} {count} layers  error {error:.2%}  accuracy {accuracy:.2%}")


@torch.no_grad()
def resnet_50() -> None:
    """Seconds that a forward pass of one image takes of one thread's CPU time, which a busy machine disturbs less."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    models = {"bfloat16": ResNetForImageClassification(ResNetConfig()).eval().bfloat16()}
    for fold in (False, True):
        model = ResNetForImageClassification(ResNetConfig()).eval().bfloat16()
        config = FP8Config(target="cpu", activation_scheme="dynamic", fold_batch_norm=fold)
        models[f"FP8, folded={fold}"] = convert(model, config)
    image = torch.randn(1, 3, 224, 224).bfloat16()
    sides = {name: partial(model, image) for name, model in models.items()}
    times = interleave(sides, least=ROUNDS, most=ROUNDS, measure=seconds_of_thread)
    for name, taken in times.items():
        print(f"ResNet-50, {name:18} {statistics.median(taken):.3f} s")


if __name__ == "__main__":
    digits()
    resnet_50()
