"""A mixture of experts in FP8 beside transformers' bfloat16 ones: decoding with cold weights, and a prompt.

    python -m benchmarks.experts [--tokens 1 4 512] [--budget SECONDS] [--vllm LIBRARY] [--single-thread]

32 experts of 2048 x 1024, of which each token goes to 4. Few tokens read only the weights of their own experts. Here no
two tokens share one, and each call goes to others than the calls before, so that all 201 MB of codes are read before an
expert's turn comes again. What FP8 reaches then is given as a part of reading the codes of the same experts from end to
end. A prompt's tokens go to random experts. FP8 with activations scaled dynamically finds the scales of its tokens
within the time. With `--vllm` the bfloat16 operator of vLLM for CPUs takes turns with them (see `vllm_cpu.py`).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers.integrations.moe import batched_mm_experts_forward, grouped_mm_experts_forward
from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from optimum_fp8 import ops

from . import machine, timing, vllm_cpu
from .failures import Rivals
from .table import Row, report

FULL_SCALE, SCALE = 448.0, 2.0**-10
TOKENS = (1, 4, 512)
WANTED_DECODING, WANTED_OF_READING = 2.5, 0.8  # either will do
WANTED_PREFILL = 0.95
VLLM = "vLLM bf16"
CLOSE = {"weight-only": 0.03, "static": 0.08, "dynamic": 0.08}  # codes are exact in bfloat16: activations are rounded

Route = tuple[torch.Tensor, torch.Tensor]  # experts of each token, and their weights
Side = Callable[[Route], torch.Tensor]


@dataclass(frozen=True)
class Shape:
    """How many experts there are, how many a token goes to, and their sizes."""

    experts: int = 32
    chosen: int = 4
    hidden: int = 2048
    inner: int = 1024

    def __str__(self) -> str:
        return f"{self.experts} of {self.hidden} x {self.inner}, {self.chosen} a token"


@dataclass(frozen=True)
class Weights:
    """One mixture on both sides: bfloat16 holds what the codes say."""

    shape: Shape
    gate_up: torch.Tensor
    down: torch.Tensor
    plain: Qwen3MoeExperts

    @classmethod
    def random(cls, shape: Shape) -> Weights:
        """Codes as quantizing a model makes them, with one scale for all."""
        config = Qwen3MoeConfig(num_experts=shape.experts, hidden_size=shape.hidden, moe_intermediate_size=shape.inner)
        plain, scale, both = Qwen3MoeExperts(config).bfloat16().requires_grad_(False), torch.tensor([SCALE]), []
        for weight in (plain.gate_up_proj, plain.down_proj):
            codes = torch.randn(weight.shape).mul_(16).to(torch.float8_e4m3fn)
            weight.data.copy_(codes.bfloat16() * SCALE)
            both.append(ops.cast_to_fp8(weight.data, scale, torch.float8_e4m3fn, FULL_SCALE))
        return cls(shape, *both, plain)

    def read(self, table: torch.Tensor) -> None:
        """Every code of neighbouring experts, once."""
        read, _ = machine.reader()
        here = slice(int(table.min()), int(table.max()) + 1)
        read(self.gate_up[here])
        read(self.down[here])


def routes(shape: Shape, tokens: int) -> timing.Rotation[Route]:
    """Where the tokens of each call go: few to neighbouring experts, one call after the other; many to random ones."""
    taken, size = tokens * shape.chosen, (tokens, shape.chosen)
    if taken <= shape.experts:
        tables = [torch.arange(first, first + taken).reshape(size) for first in range(0, shape.experts, taken)]
    else:
        tables = [torch.rand(tokens, shape.experts).topk(shape.chosen).indices for _ in range(2)]
    return timing.Rotation([(table, torch.rand(size).softmax(-1).bfloat16()) for table in tables])


def fp8(weights: Weights, x: torch.Tensor, activations: str, record: ops.CallRecord) -> Side:
    """The operator, as a module calls it."""
    experts, static = weights.shape.experts, (x.abs().amax() / FULL_SCALE).float().reshape(1)
    scale = torch.full((experts, 1, 1), SCALE)
    middle_scale = torch.full((experts, 1, 1), 2.0**-5) if activations == "static" else None

    def run(route: Route) -> torch.Tensor:
        input_scale = static if activations == "static" else None
        if activations == "dynamic":
            rule = {"rounding": "identity", "fp8_config": "E4M3", "target": "cpu", "hp_dtype": x.dtype}
            input_scale = ops.dynamic_scale(x, group=-1, divisor=FULL_SCALE, **rule)
        scales = (scale, scale, input_scale, middle_scale)
        return ops.experts(x, *route, weights.gate_up, weights.down, *scales, full_scale=FULL_SCALE, record=record)

    return run


def check(found: torch.Tensor, expected: torch.Tensor, activations: str) -> None:
    """No speed counts if the result is another one.

    Raises:
        RuntimeError: FP8 differs from bfloat16 by more than roundings.
    """
    error = float((found.float() - expected.float()).norm() / expected.float().norm())
    if not error <= CLOSE[activations]:
        raise RuntimeError(
            f"FP8 ({activations}) is {error:.1%} off bfloat16, expected {CLOSE[activations]:.0%} at most"
        )


@torch.no_grad()
def measure(
    weights: Weights,
    tokens: int,
    budget: float,
    peak: float,
    vllm: vllm_cpu.Experts | None = None,
    rivals: Rivals | None = None,
    clock: timing.Clock = timing.seconds,
) -> list[Row]:
    """The rows of the table for one number of tokens; `peak` is the FLOP/s of the matrix product at its best."""
    rivals = rivals or Rivals([VLLM])
    shape, record = weights.shape, ops.CallRecord()
    x, decodes = torch.randn(tokens, shape.hidden).bfloat16(), tokens * shape.chosen <= shape.experts
    grouped: Side = lambda route: grouped_mm_experts_forward(weights.plain, x, *route)  # noqa: E731
    taken: dict[str, Callable[[Route], Any]] = {"bf16": grouped}
    taken |= {name: fp8(weights, x, name, record) for name in CLOSE}
    if decodes:
        taken["batched"] = lambda route: batched_mm_experts_forward(weights.plain, x, *route)
        taken["read"] = lambda route: weights.read(route[0])
    if vllm is not None:
        taken[VLLM] = lambda route: vllm(x, *route)
    rotation = routes(shape, tokens)  # of all sides: what one has read is in no cache when the next has its turn
    one = rotation.take()
    expected, size = grouped(one), one[0].unique().numel() * 3 * shape.hidden * shape.inner
    for name in CLOSE:
        check(fp8(weights, x, name, record)(one), expected, name)
    if vllm is not None:
        rivals.attempt(VLLM, lambda: check(vllm(x, *one), expected, "weight-only"))
    sides = {name: lambda side=side: side(rotation.take()) for name, side in taken.items()}
    times = timing.interleave(sides, budget=budget, least=4, measure=clock, rivals=rivals)
    kernel = " ".join(name for _, name in record.kernels)
    work = 2 * tokens * shape.chosen * 3 * shape.hidden * shape.inner / peak
    return [
        _row(f"experts, {tokens} token{'s' * (tokens > 1)}, {name} ({kernel})", name, times, size, work)
        for name in CLOSE
    ]


def _row(what: str, name: str, times: timing.Times, size: int, work: float) -> Row:
    """Of the codes that are read, in bytes, and of the seconds that the arithmetic takes at its best."""
    ours, grouped = timing.median(times[name]), timing.median(times["bf16"])
    ratio = timing.ratio(times["bf16"], times[name])
    rival = f", {VLLM} {1e3 * timing.median(times[VLLM]):.2f} ms" if VLLM in times else ""
    if "read" not in times:
        figures = f"{1e3 * ours:.0f} ms", f"grouped_mm bf16 {1e3 * grouped:.0f} ms{rival}"
        return Row(what, *figures, ratio, WANTED_PREFILL, limit=work / ours, limit_name="GEMM peak")
    limit, batched = timing.ratio(times["read"], times[name]), timing.median(times["batched"])
    return Row(
        what,
        f"{1e3 * ours:.2f} ms, {size / ours / 1e9:.1f} GB/s",
        f"grouped_mm bf16 {1e3 * grouped:.2f} ms, batched_mm {1e3 * batched:.2f} ms{rival}",
        ratio,
        WANTED_DECODING if limit < WANTED_OF_READING else None,
        limit=limit,
        limit_name=f"reading ({size / timing.median(times['read']) / 1e9:.0f} GB/s)",
        wanted_limit=WANTED_OF_READING if ratio < WANTED_DECODING else None,
    )


def run(
    shape: Shape = Shape(),
    tokens: tuple[int, ...] = TOKENS,
    budget: float = 6.0,
    library: str | None = None,
    single_thread: bool = False,
) -> tuple[list[Row], list[str]]:
    """All rows of the table, and what to know about them.

    Args:
        library: vLLM's.
        single_thread: whether one thread is used, and its CPU time counts.
    """
    weights, found, threads = Weights.random(shape), list[Row](), torch.get_num_threads()
    torch.set_num_threads(1 if single_thread else threads)
    clock = timing.seconds_of_thread if single_thread else timing.seconds
    rivals, peak = Rivals([VLLM]), machine.gemm_peak(measure=clock)
    vllm = None if library is None else rivals.attempt(VLLM, lambda: _vllm(library, weights))
    for count in tokens:
        found += measure(weights, count, budget, peak.best, vllm, rivals, clock)
    torch.set_num_threads(threads)
    either = f"{WANTED_DECODING} times as fast as grouped_mm, or at {WANTED_OF_READING:.0%} of reading"
    name = "CPU time of a single thread; " if single_thread else ""
    notes = [f"experts: {name}{shape}; few tokens, none of which share an expert, are to be {either}; {peak}"]
    return found + rivals.rows("experts"), notes


def _vllm(library: str, weights: Weights) -> vllm_cpu.Experts:
    vllm_cpu.load(library, "experts")
    return vllm_cpu.Experts(weights.plain.gate_up_proj.data, weights.plain.down_proj.data)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--budget", type=float, default=6.0, help="seconds for each number of tokens")
    parser.add_argument("--vllm", metavar="LIBRARY", help="of vLLM for CPUs, to measure its operator too")
    parser.add_argument("--single-thread", action="store_true", help="measure the CPU time of one thread")
    options = parser.parse_args()
    machine.prepare()
    found, notes = run(Shape(), tuple(options.tokens), options.budget, options.vllm, options.single_thread)
    print(report(found, machine.describe(), notes))


if __name__ == "__main__":
    main()
