"""One linear layer at a time, FP8 beside bfloat16, with cold caches.

    python -m benchmarks.cpu_linear [--rows 1 4 8] [--static] [--blocks] [--single-thread] [--casts] [--vllm LIBRARY]
        [--backend cpu_avx2]

A model's weights are read once a token and are larger than any cache, so each call here gets another copy of the
weight, from more copies than twice the last cache holds. bfloat16 is called as `nn.Linear` calls it, FP8 as `FP8Linear`
does: each copy is a layer of its own, which keeps what does not change from call to call. Every round also reads one
FP8 copy from end to end: what FP8 reaches is given as a part of that, and of the peak of torch's matrix product (the
longer of both times is the limit). With `--vllm` vLLM's product with FP8 weights takes turns with them (`vllm_cpu.py`);
beside its speed stands how exact both are.
"""

from __future__ import annotations

import argparse
import math
from collections import defaultdict
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F

from optimum_fp8 import ops

from . import machine, timing, vllm_cpu
from .failures import Rivals
from .table import Row, report

FULL_SCALE = 448.0
SHAPES = ((5632, 2048), (14336, 4096), (2048, 5632), (4096, 14336))  # (out, in): the up and down projections
ROWS = (1, 4, 8, 16, 32, 64, 512)
WANTED = {1: 3.3, 4: 2.8, 8: 2.2, 16: 1.6, 32: 1.2, 64: 1.0, 512: 0.97}
WANTED_OF_READING = 0.8  # at one row
_DYNAMIC = {"channel": -1, "block of 128x128": 128, "group of 32 (MXFP8)": 32}  # values of an input that share a scale
VLLM, WANTED_BESIDE_VLLM = "vLLM", 1.0
CLOSE = 0.03  # FP8 codes are exact in bfloat16, so both sides differ by roundings of the output and the input only


@dataclass(frozen=True)
class Weights:
    """Copies of one weight on both sides. bfloat16 holds what the codes say, so both sides compute the same."""

    shape: tuple[int, int]
    plain: timing.Rotation[torch.Tensor]
    codes: timing.Rotation[torch.Tensor]
    scales: dict[str, torch.Tensor]
    packed: timing.Rotation[torch.Tensor] | None = None

    def for_vllm(self) -> Weights:
        """The same, with copies as vLLM packs them too."""
        copies = [vllm_cpu.Linear.pack(self.codes.take()) for _ in range(machine.cold_copies(math.prod(self.shape)))]
        return replace(self, packed=timing.Rotation(copies))

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
    if (packed := weights.packed) is not None:
        vllm = vllm_cpu.Linear(weights.shape, weights.scales["tensor"].item())
        sides[VLLM] = lambda: vllm(x, packed.take())
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
        if name in ("bf16", "read", VLLM):
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


def largest_error(side: Callable[[], object], weights: Weights, x: torch.Tensor, outputs: int = 256) -> float:
    """The largest error of the first outputs, beside a product in float64 of the same codes and scale, as a part of the
    largest output."""
    weight = weights.codes.take()[:outputs].double() * weights.scales["tensor"].double()
    found, expected = side(), x.double() @ weight.t()
    assert isinstance(found, torch.Tensor)
    return float((found[:, :outputs].double() - expected).abs().max() / expected.abs().max())


def wrong_codes(product: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> int:
    """How many of the 254 codes of E4M3 that are numbers a product takes for other ones.

    Args:
        product: of `x` `[rows, in]` with codes `[out, in]`, whose scale is 1: `[rows, out]`.
    """
    codes = torch.arange(256, dtype=torch.uint8)
    codes = codes[(codes & 127) != 127]
    weight = torch.zeros(256, 256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    weight.view(torch.uint8)[: len(codes), 0] = codes
    one = torch.zeros(1, 256).bfloat16()
    one[0, 0] = 1
    found = product(one, weight)[0, : len(codes)]
    return int((found.float() != codes.view(torch.float8_e4m3fn).float()).sum())


def exactness() -> str:
    """How many codes ours and vLLM's product read wrong, in words."""

    def ours(x: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        return ops.linear(x, codes, torch.ones(1), None, None, full_scale=FULL_SCALE)

    vllm = vllm_cpu.Linear((256, 256), 1.0)
    theirs = wrong_codes(lambda x, codes: vllm(x, vllm.pack(codes)))
    return (
        f"linear layers: of the 254 numbers of E4M3, {wrong_codes(ours)} are multiplied as another number, by vLLM "
        f"{theirs}; errors are the largest beside float64, as a part of the largest output"
    )


@torch.no_grad()
def measure(
    weights: Weights,
    rows: int,
    peak: float,
    static: bool,
    budget: float,
    blocks: bool = False,
    clock: timing.Clock = timing.seconds,
    rivals: Rivals | None = None,
) -> list[Row]:
    """The rows of the table for one weight and one number of input rows."""
    out_features, in_features = weights.shape
    x = torch.randn(rows, in_features).bfloat16()
    sides = sides_of(weights, x, static, blocks)
    check(sides)
    times = timing.interleave(sides, budget=budget, least=4, measure=clock, rivals=rivals)
    size, flop = out_features * in_features, 2 * rows * out_features * in_features
    kernel = backend_of(weights, x)

    def figures(name: str) -> str:
        taken, bytes_each = timing.median(times[name]), 2 if name == "bf16" else 1
        return f"{1e3 * taken:.2f} ms, {bytes_each * size / taken / 1e9:.1f} GB/s, {flop / taken / 1e9:.0f} GFLOP/s"

    def row(name: str, beside: str, wanted: float | None, more: dict[str, str]) -> Row:
        reading = timing.ratio(times["read"], times[name])
        computing = flop / peak / timing.median(times[name])
        bandwidth = f"reading ({size / timing.median(times['read']) / 1e9:.0f} GB/s)"
        return Row(
            f"linear M={rows} {out_features}x{in_features}, scale per {name} ({kernel})",
            figures(name) + more.get(name, ""),
            f"{beside} {figures(beside)}{more.get(beside, '')}",
            timing.ratio(times[beside], times[name]),
            wanted,
            limit=max(reading, computing),
            limit_name=bandwidth if reading > computing else "GEMM peak",
            wanted_limit=WANTED_OF_READING if rows == 1 and beside == "bf16" else None,
        )

    found = [row(name, "bf16", WANTED.get(rows), {}) for name in sides if name not in ("bf16", "read", VLLM)]
    if VLLM in times:
        errors = {name: f", error {largest_error(sides[name], weights, x):.2%}" for name in ("tensor", VLLM)}
        found.append(row("tensor", VLLM, WANTED_BESIDE_VLLM, errors))
    return found


def run(
    shapes: tuple[tuple[int, int], ...] = SHAPES,
    rows: tuple[int, ...] = ROWS,
    static: bool = False,
    budget: float = 1.5,
    blocks: bool = False,
    single_thread: bool = False,
    library: str | None = None,
) -> tuple[list[Row], list[str]]:
    """All rows of the table, and what to know about the limits; `library` is vLLM's."""
    threads, clock = torch.get_num_threads(), timing.seconds_of_thread if single_thread else timing.seconds
    torch.set_num_threads(1 if single_thread else threads)
    peak: machine.GemmPeak = machine.gemm_peak(measure=clock)
    found, rivals, notes = list[Row](), Rivals([VLLM]), list[str]()
    if library is not None:
        rivals.attempt(VLLM, lambda: vllm_cpu.load(library, "linear"))
        notes += filter(None, [rivals.attempt(VLLM, exactness)])
    for shape in shapes:
        weights = Weights.of(shape)
        if library is not None:
            weights = rivals.attempt(VLLM, weights.for_vllm) or weights
        for count in rows:
            found += measure(weights, count, peak.best, static, budget, blocks, clock, rivals)
    torch.set_num_threads(threads)
    _, name = machine.reader()
    clock_name = "CPU time of a single thread; " if single_thread else ""
    notes.insert(0, f"linear layers: {clock_name}{peak}; weights are read by {name}")
    return found + rivals.rows("linear layers"), notes


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
    parser.add_argument("--vllm", metavar="LIBRARY", help="of vLLM for CPUs, to measure its product too")
    parser.add_argument("--backend", help="of the FP8 side, as ops.backend takes it; default: the processor's own")
    parser.add_argument("--casts", action="store_true", help="casts and maxabs instead of linear layers")
    options = parser.parse_args()
    machine.prepare()
    with nullcontext() if options.backend is None else ops.backend(options.backend):
        found, notes = _run(options)
    print(report(found, machine.describe(), notes))


def _run(options: argparse.Namespace) -> tuple[list[Row], list[str]]:
    if options.casts:
        from . import cpu_casts

        return cpu_casts.run(budget=options.budget)
    return run(
        tuple(options.shapes),
        tuple(options.rows),
        options.static,
        options.budget,
        options.blocks,
        options.single_thread,
        options.vllm,
    )


def _shape(word: str) -> tuple[int, int]:
    out_features, in_features = word.split("x")
    return int(out_features), int(in_features)


if __name__ == "__main__":
    main()
