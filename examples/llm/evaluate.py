"""Evaluate a causal language model in high precision or FP8, in one process or many: perplexity, and tasks of lm-eval.

python examples/llm/evaluate.py                                      # the embedded model, as it is
python examples/llm/evaluate.py --fp8 static                         # quantized while it is loaded
python examples/llm/evaluate.py --model fp8/checkpoint               # what calibrate.py wrote
torchrun --nproc_per_node 2 examples/llm/evaluate.py --model …       # the processes share the batches
python examples/llm/evaluate.py --model … --data Salesforce/wikitext --subset wikitext-2-raw-v1 --split test
python examples/llm/evaluate.py --model … --tasks piqa,arc_easy      # pip install "optimum-fp8[eval]"
python examples/llm/evaluate.py --model … --tasks mine --include_path my_tasks

Perplexity is that of all text joined, in windows of `--length` tokens that do not overlap. It is the same number for
any number of processes.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator, PartialState
from accelerate.utils import gather_object, is_hpu_available
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from optimum_fp8 import FP8Config, quantization_report

TINY_LM = Path(__file__).parent / "tiny_lm"
LOADERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}  # a suffix, and datasets' name


def text_of(options: argparse.Namespace) -> str:
    """The text of a file, of all its rows, or of a dataset on the Hub."""
    suffix = Path(options.data).suffix
    if suffix in (".txt", ".md"):
        return Path(options.data).read_text(encoding="utf-8")
    if suffix in LOADERS:
        rows = load_dataset(LOADERS[suffix], data_files=options.data, split="train")
    else:
        rows = load_dataset(options.data, options.subset, split=options.split)
    if options.text_column not in rows.column_names:
        raise SystemExit(f"--text_column {options.text_column}: {options.data} has columns {rows.column_names}")
    return "\n\n".join(rows[options.text_column])


def windows(text: str, tokenizer: PreTrainedTokenizerBase, options: argparse.Namespace) -> torch.Tensor:
    """The text as `[n, length]` token ids, the incomplete rest left out."""
    ids = tokenizer(text, return_tensors="pt", verbose=False).input_ids[0]
    count = min(len(ids) // options.length, options.samples or len(ids))
    if count == 0:
        raise SystemExit(f"--length {options.length}: the text has only {len(ids)} tokens")
    return ids[: count * options.length].view(count, options.length)


@torch.no_grad()
def perplexity(model: PreTrainedModel, ids: torch.Tensor, batch_size: int, state: PartialState) -> float:
    """exp of the mean negative log-likelihood; each process takes every so many-th batch."""
    batches, losses = ids.split(batch_size), []
    for number in range(state.process_index, len(batches), state.num_processes):
        batch = batches[number].to(model.device)
        logits = model(batch).logits[:, :-1].float().flatten(0, 1)
        losses.append((number, F.cross_entropy(logits, batch[:, 1:].flatten(), reduction="sum").item()))
    total = math.fsum(loss for _, loss in gather_object(losses))  # rounded once: in whichever order
    return math.exp(total / (len(ids) * (ids.shape[1] - 1)))


def run_tasks(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, options: argparse.Namespace) -> str:
    """The table that lm-eval makes of its tasks; the processes share the questions, and rank 0 has the table."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import make_table

    accelerator = Accelerator()
    harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=options.batch_size)
    if accelerator.num_processes > 1:  # of a model that is loaded, it takes it to be alone
        harness.accelerator, harness._rank = accelerator, accelerator.process_index
        harness._world_size = accelerator.num_processes
    results: Any = simple_evaluate(
        harness,
        tasks=options.tasks.split(","),
        task_manager=TaskManager(include_path=options.include_path),
        limit=options.samples,
        bootstrap_iters=0,
    )
    return make_table(results) if results else ""


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(TINY_LM), help="a folder, or a name on the Hub; FP8 checkpoints too")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--fp8", choices=("static", "dynamic", "weight_only"), help="quantize the model while loading")
    parser.add_argument("--calibration", default=str(TINY_LM / "calibration.txt"), help="what --fp8 static measures")
    parser.add_argument("--scale-method", default="maxabs_hw")
    parser.add_argument("--target", default="auto", help="whose FP8: gaudi2, gaudi3, cuda or cpu")
    parser.add_argument("--data", default=str(TINY_LM / "heldout.txt"), help="a text file, rows, or a name on the Hub")
    parser.add_argument("--subset", help="of a dataset on the Hub")
    parser.add_argument("--split", default="test", help="of a dataset on the Hub")
    parser.add_argument("--text_column", default="text")
    parser.add_argument("--length", default=256, type=int, help="tokens of a window")
    parser.add_argument("--batch-size", default=4, type=int)
    parser.add_argument("--samples", type=int, help="at most so many windows, or questions of a task")
    parser.add_argument("--tasks", help="of lm-eval, with commas, instead of perplexity")
    parser.add_argument("--include_path", help="a folder with tasks of your own for lm-eval (.yaml)")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    options = parsed(arguments)
    if options.tasks and importlib.util.find_spec("lm_eval") is None:
        raise SystemExit('--tasks needs lm-eval, which is not installed: pip install "optimum-fp8[eval]"')
    state = PartialState(cpu=not (is_hpu_available() or torch.accelerator.is_available()))
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    keys: dict[str, Any] = {"device_map": {"": state.device}, "dtype": options.dtype}
    if options.fp8:
        dataset = options.calibration if options.fp8 == "static" else None
        keys["quantization_config"] = FP8Config(
            activation_scheme=options.fp8,
            scale_method=options.scale_method,
            target=options.target,
            dataset=dataset,
            tokenizer=tokenizer if dataset else None,
        )
    model = AutoModelForCausalLM.from_pretrained(options.model, **keys)
    if options.tasks:
        found = run_tasks(model, tokenizer, options)
    else:
        ids = windows(text_of(options), tokenizer, options)
        value = perplexity(model, ids, options.batch_size, state)
        found = f"perplexity {value:.4f} on {len(ids)} windows of {options.length} tokens"
    if state.is_main_process:
        if hasattr(model, "hf_quantizer"):
            print(str(quantization_report(model)).splitlines()[0])
        print(found)
    state.wait_for_everyone()
    state.destroy_process_group()


if __name__ == "__main__":
    main()
