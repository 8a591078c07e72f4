"""Train a causal language model on weights and inputs that are rounded to FP8, and see what that saves: a table.

Four models are compared on held-out text: trained in bf16, quantized after that training, trained in fake quantization
for as many steps on the same data, and so trained on what the bf16 model predicts (distillation). The embedded model
learns a text that is new to it, the code of transformers' models, in a format that leaves a weight very few values.

    python examples/llm/qat.py
    python examples/llm/qat.py --fp8 '{"fp8_config": "E5M2", "scale_method": "unit_scale", "quantize_lm_head": true}'
    ACCELERATE_USE_CPU=true torchrun --standalone --nproc_per_node 2 examples/llm/qat.py --batch-size 4
    python examples/llm/qat.py --model meta-llama/Llama-3.2-1B --text my.txt --heldout other.txt --output folder
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import random
import sys
import tempfile
from pathlib import Path

import torch
import transformers
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, Trainer, TrainingArguments, set_seed

from optimum_fp8 import FP8Config, convert, prepare
from optimum_fp8.training import Distillation

sys.path.insert(0, str(Path(__file__).parent))
from train_tiny_lm import drop_seen_paragraphs

TINY_LM = Path(__file__).parent / "tiny_lm"
# The largest weight of a layer lies between 2 and 4 of E5M2's smallest values, 2^-16: a layer has at most 9 of them.
FEW_VALUES = {
    "fp8_config": "E5M2",
    "scale_method": "maxabs_pow2",
    "activation_scheme": "dynamic",
    "weight_backoff": 4 * 2**-16 / 57344,
}


class Windows(Dataset):
    """A text cut into samples of so many tokens, the incomplete rest left out."""

    def __init__(self, tokenizer, text: str, length: int):
        ids = tokenizer(text, return_tensors="pt", verbose=False).input_ids[0]
        self.ids = ids[: len(ids) // length * length].view(-1, length)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[index], "labels": self.ids[index]}


def code_of_models(training: int = 1_500_000, heldout: int = 100_000) -> tuple[str, str]:
    """Two texts of so many characters, to train on and held out, of different models that transformers has."""
    files = sorted(Path(transformers.__file__).parent.glob("models/*/modeling_*.py"))
    random.Random(0).shuffle(files)
    texts = [path.read_text(encoding="utf-8") for path in files]
    held = ""
    while len(held) < heldout:
        held += texts.pop() + "\n\n"
    seen = set(held.split("\n\n"))  # models copy from each other
    return "\n\n".join(drop_seen_paragraphs(text, seen) for text in texts)[:training], held[:heldout]


@torch.no_grad()
def heldout_loss(model: PreTrainedModel, data: Windows) -> float:
    """Mean negative log-likelihood of a token, in nats."""
    model.eval()
    parts = data.ids.to(model.device).split(8)
    return sum(model(input_ids=ids, labels=ids).loss.item() * len(ids) for ids in parts) / len(data)


def trained(model: PreTrainedModel, data: Windows, args: argparse.Namespace, teacher=None) -> PreTrainedModel:
    """The model after some steps of AdamW, in all processes that a launcher has started."""
    set_seed(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        options = TrainingArguments(
            output_dir=folder, max_steps=args.steps, per_device_train_batch_size=args.batch_size,
            learning_rate=args.learning_rate, lr_scheduler_type="cosine", warmup_steps=args.steps // 20, bf16=True,
            use_cpu=not torch.accelerator.is_available(), report_to=[], save_strategy="no", logging_steps=50,
            disable_tqdm=True, seed=args.seed,
        )  # fmt: skip
        loss = None if teacher is None else Distillation(model, teacher.to(options.device))
        Trainer(model, options, train_dataset=data, compute_loss_func=loss).train()
    if loss is not None:
        loss.remove()
    return model


def quantized_after(model: PreTrainedModel, data: Windows, config: FP8Config) -> PreTrainedModel:
    """An FP8 model of one in high precision, its static scales from some of the data."""
    model = prepare(copy.deepcopy(model).eval(), config)
    with torch.no_grad():
        for ids in data.ids[:64].to(model.device).split(8):
            model(input_ids=ids)
    return convert(model)


def main(arguments: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(TINY_LM))
    parser.add_argument("--text", type=Path, help="to train on (default: code of transformers' models)")
    parser.add_argument("--heldout", type=Path, help="of the same kind as the text; both are given, or none")
    parser.add_argument("--fp8", type=json.loads, default=FEW_VALUES, help="keys of FP8Config, as JSON")
    parser.add_argument("--seed", type=int, default=0, help="of the order of the samples")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch-size", type=int, default=8, help="of each process")
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--distill", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--output", type=Path, help="folder for the FP8 model, the distilled one if there is one")
    args = parser.parse_args(arguments)
    if (args.text is None) != (args.heldout is None):
        parser.error("--text and --heldout: give both, or none of them")

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    files = (args.text, args.heldout)
    text, heldout = (path.read_text(encoding="utf-8") for path in files) if args.text else code_of_models()
    train_data, heldout_data = Windows(tokenizer, text, args.length), Windows(tokenizer, heldout, 2 * args.length)

    def in_training(**options) -> PreTrainedModel:
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
        return prepare(model, FP8Config(**args.fp8, **options)) if options else model

    losses = {"before training": heldout_loss(in_training(), heldout_data)}
    bf16 = trained(in_training(), train_data, args)
    losses["trained in bf16"] = heldout_loss(bf16, heldout_data)
    afterwards = quantized_after(bf16, train_data, FP8Config(**args.fp8))
    losses["quantized afterwards"] = heldout_loss(afterwards, heldout_data)
    in_fp8 = convert(trained(in_training(fake_quant=True), train_data, args))
    losses["trained in FP8"] = heldout_loss(in_fp8, heldout_data)
    if args.distill:
        in_fp8 = convert(trained(in_training(fake_quant=True), train_data, args, teacher=bf16))
        losses["trained in FP8, distilled"] = heldout_loss(in_fp8, heldout_data)

    best, worst = losses["trained in bf16"], losses["quantized afterwards"]
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        print(f"{'':26} held-out loss  perplexity  gap closed")
        for name, loss in losses.items():
            closed = f"{(worst - loss) / (worst - best):.0%}" if name.startswith("trained in FP8") else ""
            print(f"{name:26} {loss:13.4f}  {math.exp(loss):10.2f}  {closed:>10}")
        if args.output:
            in_fp8.save_pretrained(args.output)
            tokenizer.save_pretrained(args.output)
    return losses


if __name__ == "__main__":
    main()
