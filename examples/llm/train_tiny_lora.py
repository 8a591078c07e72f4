"""Train the LoRA adapter in `tiny_lora/`: it teaches the tiny language model to write in capitals.

The base knows hardly any text in capitals, so what the adapter is worth shows in a perplexity. `--base` may be an FP8
checkpoint: its weights are dequantized, and the adapter is then one that was trained on FP8 weights.

    python examples/llm/train_tiny_lora.py --output examples/llm/tiny_lora
"""

import argparse
import math
from pathlib import Path

import peft
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from optimum_fp8 import FP8Config

HERE = Path(__file__).parent / "tiny_lm"
WINDOW, BATCH = 128, 8
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def windows(name: str) -> torch.Tensor:
    """The tokens of a text in capitals, `[windows, WINDOW]`."""
    text = (HERE / name).read_text(encoding="utf-8").upper()
    ids = AutoTokenizer.from_pretrained(HERE)(text, return_tensors="pt")["input_ids"][0]
    return ids[: len(ids) // WINDOW * WINDOW].view(-1, WINDOW)


@torch.inference_mode()
def perplexity(model: torch.nn.Module) -> float:
    """Of the held-out text in capitals, per token."""
    batches = windows("heldout.txt")[:96].split(32)
    losses = [float(model(input_ids=batch, labels=batch).loss) for batch in batches]
    return math.exp(sum(losses) / len(losses))


def train(base: str | Path, steps: int, seed: int = 0) -> peft.PeftModel:
    """An adapter for the model in a folder, which is in high precision or dequantized."""
    torch.manual_seed(seed)
    options = {}
    if (Path(base) / "config.json").read_text(encoding="utf-8").find("quantization_config") >= 0:
        options["quantization_config"] = FP8Config(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16, **options)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=8, target_modules=PROJECTIONS))
    data, generator = windows("calibration.txt"), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW([each for each in adapted.parameters() if each.requires_grad], lr=5e-3)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 5e-3 * (1 - step / steps)
        batch = data[torch.randperm(len(data), generator=generator)[:BATCH]]
        adapted(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return adapted.eval()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", default=HERE, help="folder of the model, in high precision or in FP8")
    parser.add_argument("--output", required=True, help="folder to write the adapter to")
    parser.add_argument("--steps", type=int, default=60)
    args = parser.parse_args()
    trained = train(args.base, args.steps)
    print(f"perplexity in capitals: {perplexity(trained):.2f}")
    for parameter in trained.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()
    trained.peft_config["default"].base_model_name_or_path = "examples/llm/tiny_lm"
    trained.save_pretrained(args.output)
