"""The gradient of one linear layer's input at a time, FP8 beside bfloat16, with cold caches.

    python -m benchmarks.cpu_linear_gradient [--rows 1 32 512] [--single-thread]

bfloat16 is `grad @ weight`, as torch's autograd computes it; FP8 is `linear_input_gradient`, as the backward pass of
`FP8Linear` calls it. Weights and caches are as in `cpu_linear.py`. Scales by channels that are powers of two leave a
gradient in bfloat16; others do not, and are multiplied as float32, which processors do half as fast: the limit is then
half of torch's best bfloat16 product.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch

from optimum_fp8 import ops

from . import machine, timing
from .cpu_linear import CLOSE, FULL_SCALE, Weights
from .table import Row, report

SHAPES = ((4864, 896), (896, 4864), (4096, 4096))  # (out, in)
ROWS = (1, 8, 32, 128, 512)
WANTED = 1.0


def sides_of(weights: Weights, grad: torch.Tensor) -> dict[str, Callable[[], torch.Tensor]]:
    """What is compared: bfloat16, and FP8 with each kind of scale."""
    arbitrary = torch.full((weights.shape[0], 1), 1.25 * 2.0**-10)
    scales = {
        "tensor": weights.scales["tensor"],
        "channel": weights.scales["channel"],
        "channel, no power of two": arbitrary,
        "block of 128x128": weights.scales["block of 128x128"],
    }

    def fp8(scale: torch.Tensor) -> Callable[[], torch.Tensor]:
        return lambda: ops.linear_input_gradient(grad, weights.codes.take(), scale, None, None, full_scale=FULL_SCALE)

    return {"bf16": lambda: grad @ weights.plain.take(), **{name: fp8(scale) for name, scale in scales.items()}}


def check(sides: dict[str, Callable[[], torch.Tensor]]) -> None:
    """No speed counts if the result is another one.

    Raises:
        RuntimeError: FP8 differs from bfloat16 by more than roundings.
    """
    expected = sides["bf16"]().float()
    for name, run in sides.items():
        found = run().float() / (1.25 if name.endswith("power of two") else 1)
        error = float((found - expected).norm() / expected.norm())
        if not error <= CLOSE:
            raise RuntimeError(f"FP8 ({name}) is {error:.1%} off bfloat16, expected at most {CLOSE:.0%}")


@torch.no_grad()
def measure(
    weights: Weights, rows: int, peak: float, budget: float, clock: Callable[[Callable[[], object]], float]
) -> list[Row]:
    """The rows of the table for one weight and one number of rows of the gradient."""
    out_features, in_features = weights.shape
    grad = torch.randn(rows, out_features).bfloat16()
    sides = sides_of(weights, grad)
    check(sides)
    times = timing.interleave(sides, budget=budget, least=4, measure=clock)
    flop, plain = 2 * rows * out_features * in_features, timing.median(times["bf16"])
    found = []
    for name in (name for name in sides if name != "bf16"):
        ours, fits = timing.median(times[name]), not name.endswith("power of two")
        found.append(
            Row(
                f"input gradient M={rows} {out_features}x{in_features}, scale per {name}",
                f"{1e3 * ours:.2f} ms, {flop / ours / 1e9:.0f} GFLOP/s",
                f"bf16 {1e3 * plain:.2f} ms, {flop / plain / 1e9:.0f} GFLOP/s",
                timing.ratio(times["bf16"], times[name]),
                WANTED if fits else None,
                limit=flop / (peak if fits else peak / 2) / ours,
                limit_name="GEMM peak" if fits else "float32 peak",
            )
        )
    return found


def run(
    shapes: tuple[tuple[int, int], ...] = SHAPES,
    rows: tuple[int, ...] = ROWS,
    budget: float = 1.5,
    single_thread: bool = False,
) -> tuple[list[Row], list[str]]:
    """All rows of the table, and what to know about the limits."""
    threads, clock = torch.get_num_threads(), timing.seconds_of_thread if single_thread else timing.seconds
    torch.set_num_threads(1 if single_thread else threads)
    peak = machine.gemm_peak(measure=clock)
    found: list[Row] = []
    for shape in shapes:
        weights = Weights.of(shape)
        for count in rows:
            found += measure(weights, count, peak.best, budget, clock)
    torch.set_num_threads(threads)
    return found, [f"gradients of linear layers: {'CPU time of a single thread; ' if single_thread else ''}{peak}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS, help="rows of the gradient (tokens)")
    parser.add_argument("--budget", type=float, default=1.5, help="seconds for each number of rows and shape")
    parser.add_argument("--single-thread", action="store_true", help="the CPU time of one thread")
    options = parser.parse_args()
    machine.prepare()
    found, notes = run(SHAPES, tuple(options.rows), options.budget, options.single_thread)
    print(report(found, machine.describe(), notes))


if __name__ == "__main__":
    main()
