"""A whole model: FP8 beside bfloat16, torch's int8 and llama.cpp, in turns in one run.

    python -m benchmarks.generate [--compile] [--rivals int8 llama.cpp]

Weights only in FP8, the output head too; after a long prompt, also with keys and values in FP8. Where models run under
torch.compile, FP8 without it is beside them. Decoding is limited by
reading the weights once a step: every round also reads all FP8 weights from end to end, and the limit is given as a
part of that. A prompt is limited by the matrix product's peak. transformers' models run through `generate`, with
everything that it costs.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from . import gguf_model, machine, models, timing
from .failures import Rivals
from .rivals import LlamaCpp, Transformers
from .table import Row, report

BATCHES = (1, 8)
HEAD = models.HALF_BILLION["vocab_size"]  # rows of the output head, which sees a prompt's last token only
PROMPT, LONG_PROMPT = 32, 512
RIVALS = ("int8", "llama.cpp")
CACHED, EAGER = "FP8, cache too", "FP8 eager"
WANTED = {  # (what, beside) -> ratio
    ("decode 1", "bf16"): 3.0,
    ("decode 8", "bf16"): 2.0,
    ("prefill", "bf16"): 0.97,
    ("decode 1", "llama.cpp"): 0.9,
    ("prefill", "llama.cpp"): 2.0,
}
WANTED_COMPILED = {("decode 1", "llama.cpp"): 1.0, ("decode 1", EAGER): 1.0, ("decode 8", EAGER): 1.0}
LIKENESS = 0.95  # correlation of logits; a model that computes something else has none


def linear_weights(model: Any) -> list[torch.Tensor]:
    """What a step reads: the weights of all FP8 modules."""
    from optimum_fp8.modules import fp8_modules

    return [module.codes.data for module in fp8_modules(model).values()]


def kernels(model: Any) -> str:
    """Which kernels the FP8 modules ran on so far: "linear on cpu: 5130 calls"."""
    from optimum_fp8.modules import fp8_modules

    counts: dict[tuple[str, str], int] = {}
    for module in fp8_modules(model).values():
        for kernel, count in module.record.kernels.items():
            counts[kernel] = counts.get(kernel, 0) + count
    return ", ".join(f"{op} on {backend}: {count} calls" for (op, backend), count in sorted(counts.items()))


def engines(folder: Path, scale_method: str, rivals: Rivals, compiled: bool) -> dict[str, Any]:
    """All sides by name, "FP8" first, without those that cannot run."""
    found: dict[str, Any] = {"FP8": Transformers(models.load(folder, scale_method), compiled)}
    if compiled:
        found[EAGER] = Transformers(models.load(folder, scale_method))
    else:
        found[CACHED] = Transformers(models.load(folder, scale_method, kv_cache=True))
    found["bf16"] = Transformers(models.load(folder), compiled)
    for name in rivals.names:
        engine = rivals.attempt(name, partial(_RIVALS[name], folder))
        found |= {} if engine is None else {name: engine}
    return found


def _int8(folder: Path) -> Transformers:
    return Transformers(models.load_int8(folder))


def _llama_cpp(folder: Path) -> LlamaCpp:
    path = folder.with_name(f"{folder.name}-q8_0.gguf")
    if not path.exists():
        gguf_model.convert(folder, path.with_suffix(".part")).rename(path)
    return LlamaCpp(path)


_RIVALS: dict[str, Callable[[Path], Any]] = {"int8": _int8, "llama.cpp": _llama_cpp}


def likeness(sides: dict[str, Any], rivals: Rivals) -> dict[str, float]:
    """Correlation of each side's next-token logits with those of bfloat16.

    Raises:
        RuntimeError: FP8 computes something else, and its speed says nothing. A rival that does is out of the run.
    """
    prompt = models.prompt(1, PROMPT)
    expected = sides["bf16"].logits(prompt)

    def correlation(name: str, side: Any) -> float:
        found = float(torch.corrcoef(torch.stack([expected, side.logits(prompt)]))[0, 1])
        if not found >= LIKENESS:
            raise RuntimeError(
                f"{name} does not compute the same model as bf16: the logits of a prompt correlate by "
                f"{found:.3f}, expected at least {LIKENESS}"
            )
        return found

    alike = {name: rivals.attempt(name, partial(correlation, name, side)) for name, side in sides.items()}
    return {name: value for name, value in alike.items() if value is not None}


def compare(
    what: str,
    times: timing.Times,
    show: Callable[[float], str],
    limit: float | None,
    limit_name: str,
    wanted: dict[tuple[str, str], float],
    side: str = "FP8",
) -> list[Row]:
    """FP8 beside every other side, as rows."""
    ours = timing.median(times[side])
    return [
        Row(
            f"{what}, beside {name}",
            show(ours),
            f"{name} {show(timing.median(times[name]))}",
            timing.ratio(times[name], times[side]),
            wanted.get((what.split(",")[0], name)),
            limit=limit if name == "bf16" else None,
            limit_name=limit_name,
        )
        for name in times
        if name not in ("FP8", CACHED, "read")
    ]


def measure(
    sides: dict[str, Any], weights: list[torch.Tensor], compiled: bool, steps: int, rounds: int, rivals: Rivals
) -> list[Row]:
    """The rows of the table for all batches and the long prompt."""
    read, _ = machine.reader()
    cached, sides = sides, {name: side for name, side in sides.items() if name != CACHED}
    wanted = {**WANTED, **WANTED_COMPILED} if compiled else WANTED
    suffix = ", compiled" if compiled else ""
    interleave = partial(timing.interleave, least=rounds, most=rounds, measure=timing.told, rivals=rivals)
    found: list[Row] = []
    for batch in BATCHES:
        prompt = models.prompt(batch, PROMPT)
        runs: dict[str, Callable[[], object]] = {
            name: partial(side.decode, prompt, steps) for name, side in sides.items()
        }
        runs["read"] = lambda: timing.seconds(lambda: [read(weight) for weight in weights])
        times = interleave(runs)
        limit = timing.ratio(times["read"], times["FP8"])
        name = f"reading ({sum(weight.numel() for weight in weights) / timing.median(times['read']) / 1e9:.0f} GB/s)"
        found += compare(f"decode {batch}{suffix}", times, partial(_speed, batch), limit, name, wanted)
    peak, prompt = machine.gemm_peak(), models.prompt(1, LONG_PROMPT)
    times = interleave({name: partial(side.prefill, prompt) for name, side in sides.items()})
    flop = 2 * sum(weight.numel() * (LONG_PROMPT if weight.shape[0] != HEAD else 1) for weight in weights)
    limit = flop / peak.best / timing.median(times["FP8"])
    found += compare(f"prefill{suffix}", times, _duration, limit, "GEMM peak", wanted)
    if CACHED in cached:
        times = interleave({name: partial(side.decode, prompt, steps) for name, side in cached.items()})
        for name, what in (
            ("FP8", f"decode 1 after {LONG_PROMPT}"),
            (CACHED, f"decode 1 after {LONG_PROMPT}, FP8 cache"),
        ):
            found += compare(what, times, partial(_speed, 1), None, "", wanted, name)
    return found


def _speed(batch: int, seconds: float) -> str:
    return f"{batch / seconds:.1f} tok/s"


def _duration(seconds: float) -> str:
    return f"{1e3 * seconds:.0f} ms"


def run(
    scale_method: str = models.SCALES_PER_CHANNEL,
    beside: Sequence[str] = RIVALS,
    compiled: bool = False,
    steps: int = 24,
    rounds: int = 5,
) -> tuple[list[Row], list[str]]:
    """All rows of the table, and what to know about them."""
    rivals = Rivals(beside)
    sides = engines(models.llama(), scale_method, rivals, compiled)
    try:
        alike = ", ".join(f"{name} {value:.4f}" for name, value in likeness(sides, rivals).items() if name != "bf16")
        weights = linear_weights(sides["FP8"].model)
        found = measure(sides, weights, compiled, steps, rounds, rivals) + rivals.rows("generation")
        notes = [
            f"generation: {scale_method}, weight-only; {kernels(sides['FP8'].model)}",
            f"correlation of next-token logits with those of bf16: {alike}",
        ]
        if "llama.cpp" in sides:
            about = sides["llama.cpp"].about
            notes.append(f"llama.cpp: Q8_0, llama-cpp-python {about['version']}, {about['system'].strip(' |')}")
        return found, notes
    finally:
        if "llama.cpp" in sides:
            sides["llama.cpp"].close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compile", action="store_true", help="run transformers' models under torch.compile")
    parser.add_argument("--rivals", nargs="*", default=RIVALS, choices=RIVALS)
    parser.add_argument("--scale-method", default=models.SCALES_PER_CHANNEL)
    parser.add_argument("--steps", type=int, default=24, help="tokens decoded each time")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    machine.prepare()
    found, notes = run(options.scale_method, options.rivals, options.compile, options.steps, options.rounds)
    print(report(found, machine.describe(), notes))


if __name__ == "__main__":
    main()
