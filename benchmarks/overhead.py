"""What a decoded token costs besides its arithmetic.

    python -m benchmarks.overhead [--operators]

The model of `generate` with its layers, heads and calls, but matrices so small that they cost nothing: what remains is
the time of transformers, torch and optimum_fp8 around the arithmetic, which every token pays whatever the kernels do.
"""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

import torch

from . import machine, models, timing
from .rivals import Transformers
from .table import Row, report

STEPS = 24


def weightless(scale_method: str | None = None) -> Any:
    """The small model in bfloat16 or FP8."""
    return models.load(models.llama(models.FOLDER, "llama-weightless", **models.WEIGHTLESS), scale_method)


def linear_alone(rounds: int) -> Row:
    """One FP8Linear that computes next to nothing, beside nn.Linear, under `no_grad` as in `generate`."""
    inner = [weightless(method).model.layers[0].mlp.up_proj for method in (models.SCALES_PER_CHANNEL, None)]
    x = torch.randn(1, 1, models.WEIGHTLESS["hidden_size"]).bfloat16()

    def many(module: Any) -> None:
        for _ in range(200):
            module(x)

    with torch.no_grad():
        times = timing.interleave({"FP8": lambda: many(inner[0]), "bf16": lambda: many(inner[1])}, least=rounds)
    ours, plain = (1e6 * timing.median(times[name]) / 200 for name in ("FP8", "bf16"))
    return Row(
        "one call of a tiny linear layer",
        f"{ours:.1f} us",
        f"nn.Linear in bf16 {plain:.1f} us",
        timing.ratio(times["FP8"], times["bf16"]),
        at_most=True,
    )


def run(rounds: int = 7) -> tuple[list[Row], list[str]]:
    """The rows of the table, and what to know about them."""
    sides = {"FP8": Transformers(weightless(models.SCALES_PER_CHANNEL)), "bf16": Transformers(weightless())}
    prompt = models.prompt(1, 32, models.WEIGHTLESS["vocab_size"])
    times = timing.interleave(
        {name: partial(side.decode, prompt, STEPS) for name, side in sides.items()},
        least=rounds,
        measure=timing.told,
    )
    ours, plain = (1e3 * timing.median(times[name]) for name in ("FP8", "bf16"))
    return [
        Row(
            "a decoded token's time besides arithmetic",
            f"{ours:.2f} ms",
            f"bf16 {plain:.2f} ms",
            timing.ratio(times["FP8"], times["bf16"]),
            at_most=True,
        ),
        linear_alone(rounds),
    ], []


def operators(scale_method: str | None, count: int = 24, steps: int = 20) -> str:
    """torch's operators in one decoded token, by their own time: calls and microseconds a token."""
    from torch.profiler import ProfilerActivity, profile

    engine = Transformers(weightless(scale_method))
    prompt = models.prompt(1, 32, models.WEIGHTLESS["vocab_size"])
    engine.decode(prompt, 2)
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        engine.decode(prompt, steps)
    events = sorted(recorded.key_averages(), key=lambda event: -event.self_cpu_time_total)[:count]
    lines = [f"{'operator':48}{'calls':>8}{'us':>9}{'us a call':>11}"]
    for event in events:
        total = event.self_cpu_time_total
        lines.append(f"{event.key:48}{event.count / steps:8.1f}{total / steps:9.1f}{total / event.count:11.2f}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--operators", action="store_true", help="also list torch's operators by their own time")
    options = parser.parse_args()
    machine.prepare()
    found, notes = run()
    print(report(found, machine.describe(), notes))
    if options.operators:
        for name, method in (("bf16", None), ("FP8", models.SCALES_PER_CHANNEL)):
            print(f"\n{name}\n{operators(method)}")


if __name__ == "__main__":
    main()
