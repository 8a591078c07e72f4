"""One linear layer at a time, FP8 beside bfloat16, with cold caches.

    python -m benchmarks.cpu_linear [--rows 1 4 8] [--static] [--blocks] [--single-thread] [--casts]

A model's weights are read once a token and are larger than any cache, so each call here gets another copy of the
weight, from more copies than twice the last cache holds. bfloat16 is called as `nn.Linear` calls it, FP8 as `FP8Linear`
does: each copy is a layer of its own, which keeps what does not change from call to call. Every round also reads one
FP8 copy from end to end: what FP8 reaches is given as a part of that, and of the peak of torch's matrix product (the
longer of both times is the limit).
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F

from optimum_fp8 import ops

from . import machine, timing
from .table import Row, report

FULL_SCALE = 448.0
SHAPES = ((5632, 2048), (14336, 4096), (2048, 5632), (4096, 14336))  # (out, in): the up and down projections
ROWS = (1, 4, 8, 16, 32, 64, 512)
WANTED = {1: 3.3, 4: 2.8, 8: 2.2, 16: 1.6, 32: 1.2, 64: 1.0, 512: 0.97}
WANTED_OF_READING = 0.8  # at one row
_DYNAMIC = {"channel": -1, "block of 128x128": 128, "group of 32 (MXFP8)": 32}  # values of an input that share a scale
CLOSE = 0.03  # FP8 codes are exact in bfloat16, so both sides differ by roundings of the output and the input only


@dataclass(frozen=True)
class Weights:
    """Copies of one weight on both sides. bfloat16 holds what the codes say, so both sides compute the same."""

    shape: tuple[int, int]
    plain: timing.Rotation[torch.Tensor]
    codes: timing.Rotation[torch.Tensor]
    scales: dict[str, torch.Tensor]

    @classmethod
    def of(cls, shape: tuple[int, int]) -> Weights:
        """Random codes, scaled by a power of two per tensor or per channel; copies as quantizing a model makes them."""
        scale = torch.full((1,), 2.0**-10)
        plain = torch.randn(shape).mul_(16).to(torch.float8_e4m3fn).bfloat16() / 1024
        size = plain.numel()
        return cls(
            shape,
            timing.Rotation([plain.clone() for _ in range(machine.cold_copies(2 * size))]),
            timing.Rotation(
                [
                    ops.cast_to_fp8(plain, scale, torch.float8_e4m3fn, FULL_SCALE)
                    for _ in range(machine.cold_copies(size))
                ]
            ),
            {
                "tensor": scale,
                "channel": torch.full((shape[0], 1), 2.0**-10),
                "block of 128x128": torch.full(tuple(-(-size // 128) for size in shape), 2.0**-10),
                "group of 32 (MXFP8)": torch.full((shape[0], -(-shape[1] // 32)), 2.0**-10),
            },
        )


def sides_of(weights: Weights, x: torch.Tensor, static: bool, blocks: bool = False) -> dict[str, Callable[[], object]]:
    """What is compared: bfloat16, FP8 with each kind of scale, and reading the codes."""
    read, _ = machine.reader()
    sides: dict[str, Callable[[], object]] = {"bf16": lambda: F.linear(x, weights.plain.take())}

    def fp8(scale: torch.Tensor, input_scale: Callable[[], torch.Tensor | None]) -> Callable[[], torch.Tensor]:
        records: defaultdict[int, ops.CallRecord] = defaultdict(ops.CallRecord)

        def layer() -> torch.Tensor:
            codes = weights.codes.take()
            record = records[codes.data_ptr()]
            return ops.linear(x, codes, scale, input_scale(), None, full_scale=FULL_SCALE, record=record)

        return layer

    for granularity in ("tensor", "channel"):
        sides[granularity] = fp8(weights.scales[granularity], lambda: None)
    for granularity, group in _DYNAMIC.items() if blocks else ():
        sides[f"{granularity}, dynamic"] = fp8(weights.scales[granularity], partial(_dynamic_scale, x, group))
    if static:
        static_scale = (x.abs().amax() / FULL_SCALE).float().reshape(1)
        sides["channel, static"] = fp8(weights.scales["channel"], lambda: static_scale)
    return {**sides, "read": lambda: read(weights.codes.take())}


def _dynamic_scale(x: torch.Tensor, group: int) -> torch.Tensor:
    """As layers find it: for groups of 32 a power of two."""
    rounding = "e8m0_ceil" if group == 32 else "identity"
    return ops.dynamic_scale(
        x, group=group, divisor=FULL_SCALE, rounding=rounding, fp8_config="E4M3", target="cpu", hp_dtype=x.dtype
    )


def check(sides: dict[str, Callable[[], object]]) -> None:
    """No speed counts if the result is another one.

    Raises:
        RuntimeError: FP8 differs from bfloat16 by more than roundings.
    """
    expected = sides["bf16"]()
    assert isinstance(expected, torch.Tensor)
    for name, run in sides.items():
        if name in ("bf16", "read"):
            continue
        found = run()
        assert isinstance(found, torch.Tensor)
        error = float((found.float() - expected.float()).norm() / expected.float().norm())
        allowed = CLOSE if name in ("tensor", "channel") else 0.06
        if not error <= allowed:
            raise RuntimeError(f"FP8 ({name}) is {error:.1%} off bfloat16, expected at most {allowed:.0%}")


def backend_of(weights: Weights, x: torch.Tensor) -> str:
    """Which kernel runs the FP8 side."""
    record = ops.CallRecord()
    ops.linear(x, weights.codes.take(), weights.scales["channel"], None, None, full_scale=FULL_SCALE, record=record)
    return " ".join(name for _, name in record.kernels)


@torch.no_grad()
def measure(
    weights: Weights,
    rows: int,
    peak: float,
    static: bool,
    budget: float,
    blocks: bool = False,
    clock: Callable[[Callable[[], object]], float] = timing.seconds,
) -> list[Row]:
    """The rows of the table for one weight and one number of input rows."""
    out_features, in_features = weights.shape
    x = torch.randn(rows, in_features).bfloat16()
    sides = sides_of(weights, x, static, blocks)
    check(sides)
    times = timing.interleave(sides, budget=budget, least=4, measure=clock)
    size, flop = out_features * in_features, 2 * rows * out_features * in_features
    plain, kernel = timing.median(times["bf16"]), backend_of(weights, x)
    found = []
    for name in (name for name in sides if name not in ("bf16", "read")):
        ours = timing.median(times[name])
        reading = timing.ratio(times["read"], times[name])
        computing = flop / peak / ours
        found.append(
            Row(
                f"linear M={rows} {out_features}x{in_features}, scale per {name} ({kernel})",
                f"{1e3 * ours:.2f} ms, {size / ours / 1e9:.1f} GB/s, {flop / ours / 1e9:.0f} GFLOP/s",
                f"bf16 {1e3 * plain:.2f} ms, {2 * size / plain / 1e9:.1f} GB/s, {flop / plain / 1e9:.0f} GFLOP/s",
                timing.ratio(times["bf16"], times[name]),
                WANTED.get(rows),
                limit=max(reading, computing),
                limit_name="reading" if reading > computing else "GEMM peak",
                wanted_limit=WANTED_OF_READING if rows == 1 else None,
            )
        )
    return found


def run(
    shapes: tuple[tuple[int, int], ...] = SHAPES,
    rows: tuple[int, ...] = ROWS,
    static: bool = False,
    budget: float = 1.5,
    blocks: bool = False,
    single_thread: bool = False,
) -> tuple[list[Row], list[str]]:
    """All rows of the table, and what to know about the limits."""
    threads, clock = torch.get_num_threads(), timing.seconds_of_thread if single_thread else timing.seconds
    torch.set_num_threads(1 if single_thread else threads)
    peak: machine.GemmPeak = machine.gemm_peak(measure=clock)
    found: list[Row] = []
    for shape in shapes:
        weights = Weights.of(shape)
        for count in rows:
            found += measure(weights, count, peak.best, static, budget, blocks, clock)
    torch.set_num_threads(threads)
    _, name = machine.reader()
    clock_name = "CPU time of a single thread; " if single_thread else ""
    return found, [f"linear layers: {clock_name}{peak}; weights are read by {name}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS, help="rows of the input (tokens)")
    parser.add_argument("--shapes", nargs="+", default=SHAPES, type=_shape, help="weights, as 5632x2048 (out x in)")
    parser.add_argument("--static", action="store_true", help="also with activations rounded to FP8")
    parser.add_argument(
        "--blocks", action="store_true", help="also scales by blocks and groups, inputs rounded likewise"
    )
    parser.add_argument("--budget", type=float, default=1.5, help="seconds for each number of rows and shape")
    parser.add_argument("--single-thread", action="store_true", help="the CPU time of one thread")
    parser.add_argument("--casts", action="store_true", help="casts and maxabs instead of linear layers")
    options = parser.parse_args()
    machine.prepare()
    if options.casts:
        from . import cpu_casts

        found, notes = cpu_casts.run(budget=options.budget)
    else:
        found, notes = run(
            tuple(options.shapes),
            tuple(options.rows),
            options.static,
            options.budget,
            options.blocks,
            options.single_thread,
        )
    print(report(found, machine.describe(), notes))


def _shape(word: str) -> tuple[int, int]:
    out_features, in_features = word.split("x")
    return int(out_features), int(in_features)


if __name__ == "__main__":
    main()
