"""What a decoded token costs besides its arithmetic.

    python -m benchmarks.overhead [--operators] [--compile]

The model of `generate` with its layers, heads and calls, but matrices so small that they cost nothing: what remains is
the time of transformers, torch and optimum_fp8 around the arithmetic, which every token pays whatever the kernels do.
All of it runs in one thread.
"""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

import torch
from torch import nn

from optimum_fp8 import FP8Config, convert, prepare

from . import machine, models, timing
from .rivals import Transformers
from .table import Row, report

STEPS = 24
CALLS = 200
ALLOWED = 12.0  # microseconds of a layer


def weightless(scale_method: str | None = None) -> Any:
    """The small model in bfloat16 or FP8."""
    return models.load(models.llama(models.FOLDER, "llama-weightless", **models.WEIGHTLESS), scale_method)


LAYERS = {
    "weight_only": ("weight_only", models.SCALES_PER_CHANNEL),
    "static": ("static", models.SCALES_PER_CHANNEL),
    "dynamic": ("dynamic", models.SCALES_PER_CHANNEL),
    "dynamic per token": ("dynamic", "maxabs_pcs_pow2"),
    "dynamic by groups": ("dynamic", "mxfp8"),
}


def tiny_linear(activations: str | None, method: str = models.SCALES_PER_CHANNEL, features: int = 128) -> nn.Module:
    """A linear layer that computes next to nothing, in FP8 (with activations as they are named) or bfloat16 (None)."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(features, features, bias=False)).bfloat16()
    if activations is None:
        return plain[0]
    config = FP8Config(target="cpu", activation_scheme=activations, scale_method=method)
    model: Any = prepare(plain, config)
    model(torch.randn(4, features).bfloat16())
    converted: Any = convert(model)
    return converted[0]


@torch.no_grad()
def linear_alone(rounds: int) -> list[Row]:
    """One FP8Linear beside nn.Linear, by the CPU time of a single thread, under `no_grad` as in `generate`."""
    layers = {"bf16": tiny_linear(None), **{name: tiny_linear(*way) for name, way in LAYERS.items()}}
    x = torch.randn(1, 1, 128).bfloat16()

    def many(module: nn.Module) -> None:
        for _ in range(CALLS):
            module(x)

    sides = {name: partial(many, layer) for name, layer in layers.items()}
    times = timing.interleave(sides, least=rounds, measure=timing.seconds_of_thread)
    us = {name: 1e6 * timing.median(values) / CALLS for name, values in times.items()}
    return [
        Row(
            f"one call of a tiny linear layer, {name}",
            f"{us[name]:.1f} us",
            f"allowed {ALLOWED:.0f} us; nn.Linear in bf16 {us['bf16']:.1f} us",
            us[name] / ALLOWED,
            1.0,
            at_most=True,
        )
        for name in us
        if name != "bf16"
    ]


def decode(rounds: int, compiled: bool) -> list[Row]:
    """A token of the small model, and (compiled) the same under torch.compile beside the same without it."""
    sides = {"FP8": Transformers(weightless(models.SCALES_PER_CHANNEL)), "bf16": Transformers(weightless())}
    if compiled:
        sides["compiled"] = Transformers(weightless(models.SCALES_PER_CHANNEL), compiled)
    prompt = models.prompt(1, 32, models.WEIGHTLESS["vocab_size"])
    times = timing.interleave(
        {name: partial(side.decode, prompt, STEPS) for name, side in sides.items()},
        least=rounds,
        measure=timing.told,
    )
    ms = {name: f"{1e3 * timing.median(values):.2f} ms" for name, values in times.items()}
    what, against = "a decoded token's time besides arithmetic", timing.ratio(times["FP8"], times["bf16"])
    found = [Row(what, ms["FP8"], f"bf16 {ms['bf16']}", against, at_most=True)]
    if compiled:
        against = timing.ratio(times["FP8"], times["compiled"])
        found.append(Row(f"{what}, compiled", ms["compiled"], f"FP8 eager {ms['FP8']}", against, 1.0))
    return found


def run(rounds: int = 7, compiled: bool = False) -> tuple[list[Row], list[str]]:
    """The rows of the table, and what to know about them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    found = decode(rounds, compiled) + linear_alone(rounds)
    torch.set_num_threads(threads)
    return found, [f"besides arithmetic: a single thread; tiny linear layers by its CPU time, {CALLS} calls in a row"]


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
    parser.add_argument("--compile", action="store_true", help="also the small model under torch.compile")
    options = parser.parse_args()
    machine.prepare()
    found, notes = run(compiled=options.compile)
    print(report(found, machine.describe(), notes))
    if options.operators:
        for name, method in (("bf16", None), ("FP8", models.SCALES_PER_CHANNEL)):
            print(f"\n{name}\n{operators(method)}")


if __name__ == "__main__":
    main()
