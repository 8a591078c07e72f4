"""Fine-tune LoRA adapters on an FP8 model with transformers' Trainer, save them, and merge them.

python examples/llm/finetune_lora.py --compare                            # the embedded model; beside the bf16 base
python examples/llm/finetune_lora.py --model meta-llama/Llama-3.2-1B --dataset mine.txt --heldout other.txt
torchrun --nproc_per_node 2 examples/llm/finetune_lora.py                 # in two processes, on CPUs or GPUs
accelerate launch --config_file examples/llm/accelerate/multi_gpu.yaml examples/llm/finetune_lora.py --model …

The embedded model learns to write in capitals, which it has hardly seen.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import is_hpu_available
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments, set_seed

from optimum_fp8 import FP8Config, merge_lora

TINY_LM = Path(__file__).parent / "tiny_lm"
ON_CPU = not (is_hpu_available() or torch.accelerator.is_available())


@dataclass(frozen=True)
class Losses:
    """Of the held-out text, in nats a token, before and after the training."""

    before: float
    after: float

    @property
    def drop(self) -> float:
        return 1 - self.after / self.before

    def __str__(self) -> str:
        return f"loss {self.before:.4f} -> {self.after:.4f} ({100 * self.drop:.1f} % less)"


def windows(tokenizer: Any, text: str, length: int) -> list[dict[str, torch.Tensor]]:
    """The text as samples of `length` tokens, the incomplete rest left out."""
    ids = tokenizer(text, return_tensors="pt", verbose=False).input_ids[0]
    return [{"input_ids": part, "labels": part} for part in ids[: len(ids) // length * length].view(-1, length)]


def texts(options: argparse.Namespace) -> tuple[str, str]:
    """What is trained on, and what is held out."""
    if options.dataset is None:
        return tuple(
            (TINY_LM / name).read_text(encoding="utf-8").upper() for name in ("calibration.txt", "heldout.txt")
        )
    dataset = Path(options.dataset).read_text(encoding="utf-8")
    if options.heldout is not None:
        return dataset, Path(options.heldout).read_text(encoding="utf-8")
    return dataset[: len(dataset) * 9 // 10], dataset[len(dataset) * 9 // 10 :]


def fine_tune(options: argparse.Namespace, config: FP8Config | None, output: Path) -> Losses:
    """Train adapters on the model in FP8, or without a config in bfloat16; they are saved in `output`/adapter, and the
    FP8 model in `output`/base."""
    set_seed(options.seed)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.bfloat16, quantization_config=config)
    if config is not None and PartialState().is_main_process:
        model.save_pretrained(output / "base")
        tokenizer.save_pretrained(output / "base")
    lora = LoraConfig(r=options.rank, lora_alpha=2 * options.rank, target_modules="all-linear", task_type="CAUSAL_LM")
    train, heldout = (windows(tokenizer, text, options.length) for text in texts(options))
    trainer = Trainer(
        get_peft_model(model, lora),
        TrainingArguments(
            output_dir=str(output),
            max_steps=options.steps,
            per_device_train_batch_size=options.batch_size,
            per_device_eval_batch_size=options.batch_size,
            gradient_accumulation_steps=options.accumulate,
            gradient_checkpointing=options.gradient_checkpointing,
            learning_rate=options.learning_rate,
            bf16=True,
            use_cpu=ON_CPU,
            seed=options.seed,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            ddp_find_unused_parameters=False,
        ),
        train_dataset=train,
        eval_dataset=heldout[: options.heldout_windows],
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    losses = Losses(before, trainer.evaluate()["eval_loss"])
    trainer.save_model(str(output / "adapter"))
    return losses


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(TINY_LM))
    parser.add_argument("--dataset", help="a text; without one, that of the embedded model in capitals")
    parser.add_argument("--heldout", help="another text; without one, the last tenth of the dataset")
    parser.add_argument("--heldout-windows", default=64, type=int, help="how much of it, in windows")
    parser.add_argument("--length", default=128, type=int, help="tokens of a window")
    parser.add_argument("--steps", default=150, type=int)
    parser.add_argument("--batch-size", default=8, type=int, help="windows of one process")
    parser.add_argument("--accumulate", default=1, type=int, help="batches of one step")
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--learning-rate", default=5e-3, type=float)
    parser.add_argument("--rank", default=8, type=int)
    parser.add_argument("--activation-scheme", default="dynamic", choices=["dynamic", "weight_only"])
    parser.add_argument("--compare", action="store_true", help="train on the bfloat16 base, too")
    parser.add_argument("--seed", default=0, type=int)
    parser.add_argument("--output", default="fp8/lora")
    options = parser.parse_args(arguments)

    state, output = PartialState(cpu=ON_CPU), Path(options.output)
    config = FP8Config.preset("FP8_DYNAMIC") if options.activation_scheme == "dynamic" else None
    config = config or FP8Config(activation_scheme="weight_only")
    losses = fine_tune(options, config, output)
    state.print(f"FP8 base:  {losses}")
    if options.compare:
        state.print(f"bf16 base: {fine_tune(options, None, output / 'bf16')}")
    if state.is_main_process:
        report = merge_lora(output / "base", output / "adapter", output / "merged", trained_on="fp8")
        error = max(layer.error for layer in report.layers)
        print(
            f"merged into {len(report.layers)} layers: weights off by {100 * error:.1f} % at most ({output / 'merged'})"
        )
    state.wait_for_everyone()
    state.destroy_process_group()


if __name__ == "__main__":
    main()
