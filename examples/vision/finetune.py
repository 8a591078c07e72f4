"""Train an image classifier on weights and inputs that are rounded to FP8, and see what that saves: a table.

The embedded vision transformer is trained on, on scikit-learn's handwritten digits, in high precision and in fake
quantization, for as many steps on the same images; the held-out fifth tells how they compare.

    python examples/vision/finetune.py
    python examples/vision/finetune.py --fp8 '{"fp8_config": "E5M2", "scale_method": "unit_scale"}'
    ACCELERATE_USE_CPU=true torchrun --standalone --nproc_per_node 2 examples/vision/finetune.py
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from digits import load_split
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    set_seed,
)

from optimum_fp8 import FP8Config, convert, prepare

TINY_VIT = Path(__file__).parent / "tiny_vit"
COARSE = {
    "scale_method": "maxabs_pow2",
    "activation_scheme": "dynamic",
    "weight_backoff": 1.5e-5,
}  # few values a weight


def images(name: str, part: str) -> list[dict[str, torch.Tensor]]:
    """The digits of one part, as the model takes them."""
    pictures, labels = load_split(part)
    pixels = AutoImageProcessor.from_pretrained(name, backend="pil")(pictures, return_tensors="pt")["pixel_values"]
    return [{"pixel_values": x, "labels": torch.tensor(y)} for x, y in zip(pixels, labels, strict=True)]


@torch.no_grad()
def heldout(model: PreTrainedModel, data: list[dict[str, torch.Tensor]]) -> tuple[float, float]:
    """Cross entropy, in nats, and the share of images that are told right."""
    labels = torch.stack([each["labels"] for each in data])
    pixels = torch.stack([each["pixel_values"] for each in data])
    logits = model.eval()(pixel_values=pixels.to(model.device)).logits.cpu()
    return F.cross_entropy(logits, labels).item(), (logits.argmax(-1) == labels).float().mean().item()


def trained(model: PreTrainedModel, data: list[dict[str, torch.Tensor]], args: argparse.Namespace) -> PreTrainedModel:
    """The model after some steps of AdamW, in all processes that a launcher has started."""
    set_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        options = TrainingArguments(
            output_dir=folder, max_steps=args.steps, per_device_train_batch_size=args.batch_size,
            learning_rate=args.learning_rate, lr_scheduler_type="cosine", report_to=[], save_strategy="no",
            use_cpu=not torch.accelerator.is_available(), disable_tqdm=True, logging_steps=50, seed=0,
        )  # fmt: skip
        Trainer(model, options, train_dataset=data).train()
    return model


def main(arguments: list[str] | None = None) -> dict[str, tuple[float, float]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(TINY_VIT))
    parser.add_argument("--fp8", type=json.loads, default=COARSE, help="keys of FP8Config, as JSON")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=32, help="of each process")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--output", type=Path, help="folder for the FP8 model")
    args = parser.parse_args(arguments)
    train_data, heldout_data = images(args.model, "train"), images(args.model, "heldout")

    def loaded() -> PreTrainedModel:
        return AutoModelForImageClassification.from_pretrained(args.model, dtype=torch.float32)

    plain = trained(loaded(), train_data, args)
    found = {"trained in high precision": heldout(plain, heldout_data)}
    afterwards = prepare(copy.deepcopy(plain).eval(), FP8Config(**args.fp8))
    heldout(afterwards, train_data[:128])  # ranges, where they are static
    found["quantized afterwards"] = heldout(convert(afterwards), heldout_data)
    in_fp8 = convert(trained(prepare(loaded(), FP8Config(**args.fp8, fake_quant=True)), train_data, args))
    found["trained in FP8"] = heldout(in_fp8, heldout_data)

    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        print(f"{'':26} held-out loss  accuracy")
        for name, (loss, accuracy) in found.items():
            print(f"{name:26} {loss:13.4f}  {accuracy:8.1%}")
        if args.output:
            in_fp8.save_pretrained(args.output)
    return found


if __name__ == "__main__":
    main()
