"""Attention over an FP8 cache beside torch's over a bfloat16 one: decoding with cold caches, and prefill.

    python -m benchmarks.attention [--tokens 8192 32768] [--prompts 512 2048] [--vllm LIBRARY] [--single-thread]

Decoding reads the whole cache for each token: each call gets another copy, from more copies than twice the last cache
holds, and what FP8 reaches is given as a part of reading the same codes from end to end.

torch's attention takes far longer for one token than its cache takes to read, so more are beside ours: our own kernel
over a bfloat16 cache (see `bf16_cache.py`), which tells what FP8 gains and no more; torch's matrix products and softmax
by hand; reading the bfloat16 cache (no kernel for one can be faster); and with `--vllm` those of vLLM (see
`vllm_cpu.py`) over caches in bfloat16 and in FP8. Errors are the largest beside float64, as a part of the largest
output.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F

from optimum_fp8 import ops

from . import bf16_cache, machine, timing, vllm_cpu
from .failures import Rivals
from .table import Row, report

FULL_SCALE, SCALE = 448.0, 2.0**-5
K_SCALE = V_SCALE = torch.tensor([SCALE])  # parameters of a model: there before a token is
TOKENS = (8192, 32768)
PROMPTS = (512, 2048)
WANTED_DECODING, WANTED_PREFILL = 1.7, 0.9
WANTED_OF_READING = 0.7
SDPA, BY_HAND, READING_BF16 = "SDPA bf16", "products bf16", "reading the bf16 cache"
OUR_BF16 = "our kernel of a bf16 cache"
VLLM = {"vLLM bf16": "attention", "vLLM FP8": "attention over FP8"}  # what each needs of vLLM
WANTED_BESIDE = {SDPA: WANTED_DECODING, OUR_BF16: 1.6, "vLLM bf16": 1.0, "vLLM FP8": 1.0}
CLOSE = 0.02  # both sides hold the same values: what differs is where they round


@dataclass(frozen=True)
class Heads:
    """How many heads of queries and of keys, and their size."""

    queries: int
    keys: int
    size: int = 128

    def __str__(self) -> str:
        return f"{self.queries}/{self.keys} heads of {self.size}"


SHAPES = (Heads(16, 8), Heads(16, 16), Heads(32, 8))


def codes(heads: Heads, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values: random codes, of numbers that bfloat16 holds as well."""
    key, value = (torch.randn(1, heads.keys, tokens, heads.size).div_(SCALE) for _ in range(2))
    return key.to(torch.float8_e4m3fn), value.to(torch.float8_e4m3fn)


def plain(both: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """The same numbers in bfloat16."""
    key, value = (x.bfloat16() * SCALE for x in both)
    return key, value


def fp8_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, record: ops.CallRecord | None = None
) -> torch.Tensor:
    """`[B, S, H, D]`, causal where there is more than one query."""
    length = query.shape[2]
    mask = None if length == 1 else causal_mask(length)
    return ops.attention(
        *(query, key, value, None, K_SCALE, V_SCALE, None, None, mask),
        scaling=query.shape[-1] ** -0.5,
        dtype=torch.float8_e4m3fn,
        full_scale=FULL_SCALE,
        record=record,
    )


def causal_mask(length: int) -> torch.Tensor:
    """As models hand it to eager attention."""
    return torch.full((1, 1, length, length), torch.finfo(torch.bfloat16).min, dtype=torch.bfloat16).triu(1)


def check(found: torch.Tensor, expected: torch.Tensor) -> None:
    """No speed counts if the result is another one.

    Raises:
        RuntimeError: `found` differs from torch's in bfloat16 by more than roundings.
    """
    expected = expected.transpose(1, 2).float()
    apart = float((found.float() - expected).norm() / expected.norm())
    if not apart <= CLOSE:
        raise RuntimeError(f"attention is {apart:.1%} off bfloat16, expected at most {CLOSE:.0%}")


def backend_of(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> str:
    """Which kernel runs the FP8 side."""
    record = ops.CallRecord()
    fp8_attention(query, key, value, record)
    return " ".join(name for _, name in record.kernels)


def by_hand(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """`[1, H, S, D]`, without a mask: the queries that share a head of keys are the rows of one matrix product."""
    _, key_heads, _, size = key.shape
    rows = query.reshape(1, key_heads, -1, size)
    scores = (rows @ key.transpose(2, 3)).float() * size**-0.5
    return (scores.softmax(-1).to(value.dtype) @ value).reshape(query.shape)


def exact(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """`[1, S, H, D]` in float64, of queries that stand at the end."""
    (_, heads, queries, size), (_, key_heads, keys, _) = query.shape, key.shape
    future = torch.ones(queries, keys, dtype=torch.bool).triu(keys - queries + 1)
    rows = query.double().reshape(1, key_heads, -1, size)
    scores = (rows @ key.double().transpose(2, 3) * size**-0.5).view(1, heads, queries, keys)
    weights = scores.masked_fill(future, -torch.inf).softmax(-1).view(1, key_heads, -1, keys)
    return (weights @ value.double()).view(query.shape).transpose(1, 2)


def error(found: torch.Tensor, expected: torch.Tensor) -> str:
    """The largest error, as a part of the largest output."""
    return f", error {float((found.double() - expected).abs().max() / expected.abs().max()):.2%}"


def vllm_names(rivals: Rivals) -> list[str]:
    """Those of the rivals that are vLLM's."""
    return [name for name in rivals.names if name in VLLM]


def vllm_side(
    name: str, query: torch.Tensor, plain_cache: tuple[torch.Tensor, torch.Tensor], copies: int
) -> Callable[[], torch.Tensor]:
    """One of vLLM's, over so many copies of the cache."""
    cache = vllm_cpu.Cache.of(*plain_cache, SCALE if name == "vLLM FP8" else None)
    attend, caches = vllm_cpu.Attention(query, cache), timing.Rotation([cache.clone() for _ in range(copies)])
    return lambda: attend(caches.take())


def decode(heads: Heads, tokens: int, budget: float, rivals: Rivals, clock: timing.Clock = timing.seconds) -> list[Row]:
    """One token with `tokens` tokens cached."""
    query, cache = torch.randn(1, heads.queries, 1, heads.size).bfloat16(), codes(heads, tokens)
    size, flat = 2 * cache[0].numel(), plain(cache)
    copies = {1: machine.cold_copies(size), 2: machine.cold_copies(2 * size)}  # by the bytes of a value
    fp8 = timing.Rotation([(k.clone(), v.clone()) for k, v in [cache] * copies[1]])
    bf16 = timing.Rotation([(k.clone(), v.clone()) for k, v in [flat] * copies[2]])
    read, _ = machine.reader()
    torchs = F.scaled_dot_product_attention(query, *flat, enable_gqa=True)
    check(fp8_attention(query, *cache), torchs)
    sides: dict[str, Callable[[], object]] = {
        "fp8": lambda: fp8_attention(query, *fp8.take()),
        SDPA: lambda: F.scaled_dot_product_attention(query, *bf16.take(), enable_gqa=True).transpose(1, 2),
        BY_HAND: lambda: by_hand(query, *bf16.take()).transpose(1, 2),
        READING_BF16: lambda: [read(x) for x in bf16.take()],
        "read": lambda: [read(x) for x in fp8.take()],
    }
    if OUR_BF16 in rivals.names and OUR_BF16 not in rivals.reasons:
        check(bf16_cache.attention(query, *flat), torchs)
        sides[OUR_BF16] = lambda: bf16_cache.attention(query, *bf16.take())
    for name in vllm_names(rivals):
        side = rivals.attempt(name, partial(vllm_side, name, query, flat, copies[1 + ("bf16" in name)]))
        sides |= {} if side is None else {name: side}
    expected = exact(query, *flat)
    errors = {name: error(side(), expected) for name, side in sides.items() if "read" not in name}  # type: ignore[arg-type]
    times = timing.interleave(sides, budget=budget, least=5, measure=clock, rivals=rivals)
    what = f"decode attention, {heads}, {tokens} tokens cached ({backend_of(query, *cache)})"
    bandwidth = size / timing.median(times["read"]) / 1e9

    def figures(name: str) -> str:
        taken, moved = timing.median(times[name]), size if name in ("fp8", "vLLM FP8") else 2 * size
        bound = f", {timing.ratio(times[READING_BF16], times[name]):.0%} of reading" if name == OUR_BF16 else ""
        return f"{1e3 * taken:.2f} ms, {moved / taken / 1e9:.1f} GB/s{bound}{errors.get(name, '')}"

    return [
        Row(
            what,
            figures("fp8"),
            f"{name} {figures(name)}",
            timing.ratio(times[name], times["fp8"]),
            WANTED_BESIDE.get(name),
            limit=timing.ratio(times["read"], times["fp8"]),
            limit_name=f"reading ({bandwidth:.0f} GB/s)",
            wanted_limit=WANTED_OF_READING if name == SDPA else None,
        )
        for name in times
        if name not in ("fp8", "read")
    ]


def prefill(
    heads: Heads, length: int, budget: float, peak: float, rivals: Rivals, clock: timing.Clock = timing.seconds
) -> list[Row]:
    """A prompt of `length` tokens, causal: our mask is a tensor, as models make it; others are told that it is causal.

    `peak` is the FLOP/s of the matrix product at its best."""
    query, cache = torch.randn(1, heads.queries, length, heads.size).bfloat16(), codes(heads, length)
    key, value = flat = plain(cache)
    sides: dict[str, Callable[[], torch.Tensor]] = {
        "fp8": lambda: fp8_attention(query, *cache),
        SDPA: lambda: F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True),
    }
    check(sides["fp8"](), sides[SDPA]())
    for name in vllm_names(rivals):
        side = rivals.attempt(name, partial(vllm_side, name, query, flat, 1))
        sides |= {} if side is None else {name: side}
    times = timing.interleave(sides, budget=budget, least=5, measure=clock, rivals=rivals)
    flop = 2 * heads.queries * heads.size * length * (length + 1)

    def figures(name: str) -> str:
        return f"{1e3 * timing.median(times[name]):.1f} ms, {flop / timing.median(times[name]) / 1e9:.0f} GFLOP/s"

    return [
        Row(
            f"prefill attention, {heads}, 1x{length} ({backend_of(query, *cache)})",
            figures("fp8"),
            f"{name} {figures(name)}",
            timing.ratio(times[name], times["fp8"]),
            WANTED_PREFILL if name == SDPA else None,
            limit=flop / peak / timing.median(times["fp8"]),
            limit_name="GEMM peak",
        )
        for name in times
        if name != "fp8"
    ]


def run(
    shapes: tuple[Heads, ...] = SHAPES,
    tokens: tuple[int, ...] = TOKENS,
    prompts: tuple[int, ...] = PROMPTS,
    budget: float = 1.5,
    library: str | None = None,
    single_thread: bool = False,
) -> tuple[list[Row], list[str]]:
    """All rows of the table, and what to know about them.

    Args:
        library: vLLM's.
        single_thread: whether one thread is used, and its CPU time counts.
    """
    threads, clock = torch.get_num_threads(), timing.seconds_of_thread if single_thread else timing.seconds
    torch.set_num_threads(1 if single_thread else threads)
    rivals, peak = Rivals([OUR_BF16, *(VLLM if library else ())]), machine.gemm_peak(measure=clock)
    rivals.attempt(OUR_BF16, bf16_cache.load)
    for name in vllm_names(rivals):
        rivals.attempt(name, partial(vllm_cpu.load, str(library), VLLM[name]))
    found = [row for heads in shapes for count in tokens for row in decode(heads, count, budget, rivals, clock)]
    found += [row for length in prompts for row in prefill(shapes[0], length, budget, peak.best, rivals, clock)]
    torch.set_num_threads(threads)
    clock_name = "CPU time of a single thread; " if single_thread else ""
    about = "attention: {}caches are read by {}; SDPA with enable_gqa, keys are not repeated; {}"
    return found + rivals.rows("attention"), [about.format(clock_name, machine.reader()[1], peak)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS, help="tokens in the cache")
    parser.add_argument("--prompts", type=int, nargs="+", default=PROMPTS, help="tokens of a prompt")
    parser.add_argument("--budget", type=float, default=1.5, help="seconds for each row")
    parser.add_argument("--vllm", metavar="LIBRARY", help="of vLLM for CPUs, to measure its attention too")
    parser.add_argument("--single-thread", action="store_true", help="the CPU time of one thread")
    options = parser.parse_args()
    machine.prepare()
    lengths = tuple(options.tokens), tuple(options.prompts)
    found, notes = run(SHAPES, *lengths, options.budget, options.vllm, options.single_thread)
    print(report(found, machine.describe(), notes))


if __name__ == "__main__":
    main()
