"""Quantize a causal language model to FP8 in several ways and see what each costs: measured once, then a table.

python examples/llm/quantize_llm.py                       # the embedded model
python examples/llm/quantize_llm.py --model meta-llama/Llama-3.2-1B --calibration my.txt --heldout other.txt
python examples/llm/quantize_llm.py --target gaudi2 --static-cache    # on a CPU: what a Gaudi2 will compute
python examples/llm/quantize_llm.py --device hpu --static-cache       # on a Gaudi: static shapes
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from optimum_fp8 import FP8Config, quantization_report, start_on_gaudi

TINY_LM = Path(__file__).parent / "tiny_lm"
SCALE_METHODS = ("maxabs_hw", "maxabs_arbitrary", "act_maxabs_pow2_weights_pcs_opt_pow2")
PROMPT = "def __init__(self,"


def windows(tokenizer, path: Path, length: int = 256) -> torch.Tensor:
    """The text as `[n, length]` token ids, the incomplete rest left out."""
    ids = tokenizer(path.read_text(encoding="utf-8"), return_tensors="pt", verbose=False).input_ids[0]
    return ids[: len(ids) // length * length].view(-1, length)


@torch.no_grad()
def log_probabilities(model: PreTrainedModel, ids: torch.Tensor, batch: int = 16) -> torch.Tensor:
    """Log-probabilities of all next tokens, float32 `[n * (length - 1), vocabulary]`."""
    logits = [model(part.to(model.device)).logits[:, :-1].float().cpu() for part in ids.split(batch)]
    return torch.cat(logits).flatten(0, 1).log_softmax(-1)


def perplexity(log_p: torch.Tensor, ids: torch.Tensor) -> float:
    """exp of the mean negative log-likelihood."""
    return math.exp(F.nll_loss(log_p, ids[:, 1:].flatten()).item())


def tokens_per_second(
    models: list[PreTrainedModel], prompt: torch.Tensor, cache: dict[str, str], new_tokens: int = 32
) -> list[float]:
    """Greedy generation at batch 1: medians of runs that take turns, after one to warm up."""
    options = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False, **cache}
    times: list[list[float]] = [[] for _ in models]
    for _ in range(4):
        for model, seconds in zip(models, times, strict=True):
            started = time.perf_counter()
            model.generate(prompt.to(model.device), **options)
            seconds.append(time.perf_counter() - started)
    return [new_tokens / statistics.median(seconds[1:]) for seconds in times]


def weight_bytes(model: PreTrainedModel) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def check_round_trip(model: PreTrainedModel, ids: torch.Tensor) -> None:
    """Save, reload, and compare logits to the bit."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        reloaded = AutoModelForCausalLM.from_pretrained(folder, device_map=model.device)
        with torch.no_grad():
            ids = ids.to(model.device)
            equal = torch.equal(model(ids).logits, reloaded(ids).logits)
    if not equal:
        raise SystemExit("the reloaded model computes other logits")
    print("saved and reloaded: logits equal to the bit")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(TINY_LM))
    parser.add_argument("--calibration", default=TINY_LM / "calibration.txt", type=Path)
    parser.add_argument("--heldout", default=TINY_LM / "heldout.txt", type=Path)
    parser.add_argument("--windows", type=int, help="compare on so many windows of 256 tokens (by default on all)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or hpu")
    parser.add_argument(
        "--target", default="auto", help="whose FP8: gaudi2, gaudi3, cuda or cpu (by default what is there)"
    )
    parser.add_argument("--static-cache", action="store_true", help="keys and values in FP8, in a cache of fixed size")
    options = parser.parse_args(arguments)
    cache = {"cache_implementation": "static"} if options.static_cache else {}
    loading = {"dtype": torch.bfloat16, "device_map": options.device}
    if options.device == "hpu":
        start_on_gaudi()  # before anything moves there; loading an FP8 model does the rest

    # 1. The baseline.
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    baseline = AutoModelForCausalLM.from_pretrained(options.model, **loading)
    ids = windows(tokenizer, options.heldout)[: options.windows]
    prompt = tokenizer(PROMPT, return_tensors="pt").input_ids
    expected = log_probabilities(baseline, ids)
    header = f"{'model':40} {'MB':>6} {'perplexity':>10} {'ratio':>7} {'KL':>8} {'top-1':>7} {'tok/s':>6}"
    base = perplexity(expected, ids)
    rows = [(baseline, "bfloat16", expected)]

    # 2. Measure on the calibration text, once; quantize by its ranges, with one call for each scale method.
    with tempfile.TemporaryDirectory() as folder:
        ranges = f"{folder}/ranges"
        measure = FP8Config(
            mode="MEASURE",
            dataset=str(options.calibration),
            tokenizer=tokenizer,
            dump_stats_path=ranges,
            kv_cache=options.static_cache,
        )
        AutoModelForCausalLM.from_pretrained(options.model, quantization_config=measure, **loading)
        for method in SCALE_METHODS:
            config = FP8Config(
                mode="QUANTIZE",
                scale_method=method,
                dump_stats_path=ranges,
                target=options.target,
                kv_cache=options.static_cache,
            )
            model = AutoModelForCausalLM.from_pretrained(options.model, quantization_config=config, **loading)
            rows.append((model, f"FP8 {method}", log_probabilities(model, ids)))

    # 3. What it costs.
    print(f"\n{header}\n{'-' * len(header)}")
    speeds = tokens_per_second([model for model, _, _ in rows], prompt, cache)
    for (model, name, found), speed in zip(rows, speeds, strict=True):
        ppl = perplexity(found, ids)
        divergence = F.kl_div(found, expected, log_target=True, reduction="batchmean").item()
        agreement = (found.argmax(-1) == expected.argmax(-1)).float().mean().item()
        print(
            f"{name:40} {weight_bytes(model) / 1e6:6.2f} {ppl:10.3f} {ppl / base:7.4f} {divergence:8.5f} "
            f"{agreement:7.2%} {speed:6.1f}"
        )
    for model, name, _ in rows[:2]:
        text = tokenizer.decode(model.generate(prompt.to(model.device), max_new_tokens=24, do_sample=False, **cache)[0])
        print(f"\n{name} writes:\n{text}")
    print(f"\n{str(quantization_report(rows[1][0])).splitlines()[0]}")
    check_round_trip(rows[1][0], ids[:2])


if __name__ == "__main__":
    main()
