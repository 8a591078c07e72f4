"""Attention over an FP8 cache beside torch's over a bfloat16 one: decoding with cold caches, and prefill.

    python -m benchmarks.attention [--tokens 8192 32768] [--prompts 512 2048] [--budget SECONDS]

Decoding reads the whole cache for each token: each call gets another copy, from more copies than twice the last cache
holds, and what FP8 reaches is given as a part of reading the same codes from end to end.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from optimum_fp8 import ops

from . import machine, timing
from .table import Row, report

FULL_SCALE, SCALE = 448.0, 2.0**-5
K_SCALE = V_SCALE = torch.tensor([SCALE])  # parameters of a model: there before a token is
TOKENS = (8192, 32768)
PROMPTS = (512, 2048)
WANTED_DECODING, WANTED_PREFILL = 1.7, 0.9
WANTED_OF_READING = 0.7
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
        RuntimeError: FP8 differs from bfloat16 by more than roundings.
    """
    expected = expected.transpose(1, 2).float()
    error = float((found.float() - expected).norm() / expected.norm())
    if not error <= CLOSE:
        raise RuntimeError(f"FP8 attention is {error:.1%} off bfloat16, expected at most {CLOSE:.0%}")


def backend_of(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> str:
    """Which kernel runs the FP8 side."""
    record = ops.CallRecord()
    fp8_attention(query, key, value, record)
    return " ".join(name for _, name in record.kernels)


def decode(heads: Heads, tokens: int, budget: float) -> Row:
    """One token with `tokens` tokens cached."""
    query, cache = torch.randn(1, heads.queries, 1, heads.size).bfloat16(), codes(heads, tokens)
    size = 2 * cache[0].numel()
    fp8 = timing.Rotation([(k.clone(), v.clone()) for k, v in [cache] * machine.cold_copies(size)])
    bf16 = timing.Rotation([plain(cache) for _ in range(machine.cold_copies(2 * size))])
    read, _ = machine.reader()
    check(fp8_attention(query, *cache), F.scaled_dot_product_attention(query, *plain(cache), enable_gqa=True))
    sides: dict[str, Callable[[], object]] = {
        "fp8": lambda: fp8_attention(query, *fp8.take()),
        "bf16": lambda: F.scaled_dot_product_attention(query, *bf16.take(), enable_gqa=True),
        "read": lambda: [read(x) for x in fp8.take()],
    }
    times = timing.interleave(sides, budget=budget, least=5)
    ours, theirs = timing.median(times["fp8"]), timing.median(times["bf16"])
    return Row(
        f"decode attention, {heads}, {tokens} tokens cached ({backend_of(query, *cache)})",
        f"{1e3 * ours:.2f} ms, {size / ours / 1e9:.1f} GB/s",
        f"SDPA bf16 {1e3 * theirs:.2f} ms, {2 * size / theirs / 1e9:.1f} GB/s",
        timing.ratio(times["bf16"], times["fp8"]),
        WANTED_DECODING,
        limit=timing.ratio(times["read"], times["fp8"]),
        limit_name="reading",
        wanted_limit=WANTED_OF_READING,
    )


def prefill(heads: Heads, length: int, budget: float) -> Row:
    """A prompt of `length` tokens, causal: our mask is a tensor, as models make it; torch is told that it is causal."""
    query, cache = torch.randn(1, heads.queries, length, heads.size).bfloat16(), codes(heads, length)
    key, value = plain(cache)
    sides: dict[str, Callable[[], torch.Tensor]] = {
        "fp8": lambda: fp8_attention(query, *cache),
        "bf16": lambda: F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True),
    }
    check(sides["fp8"](), sides["bf16"]())
    times = timing.interleave(sides, budget=budget, least=5)
    flop = 2 * heads.queries * heads.size * length * (length + 1)
    ours, theirs = timing.median(times["fp8"]), timing.median(times["bf16"])
    return Row(
        f"prefill attention, {heads}, 1x{length} ({backend_of(query, *cache)})",
        f"{1e3 * ours:.1f} ms, {flop / ours / 1e9:.0f} GFLOP/s",
        f"SDPA bf16 {1e3 * theirs:.1f} ms, {flop / theirs / 1e9:.0f} GFLOP/s",
        timing.ratio(times["bf16"], times["fp8"]),
        WANTED_PREFILL,
    )


def run(
    shapes: tuple[Heads, ...] = SHAPES,
    tokens: tuple[int, ...] = TOKENS,
    prompts: tuple[int, ...] = PROMPTS,
    budget: float = 1.5,
) -> tuple[list[Row], list[str]]:
    """All rows of the table, and what to know about them."""
    found = [decode(heads, count, budget) for heads in shapes for count in tokens]
    found += [prefill(shapes[0], length, budget) for length in prompts]
    return found, [f"attention: caches are read by {machine.reader()[1]}; SDPA with enable_gqa, keys are not repeated"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS, help="tokens in the cache")
    parser.add_argument("--prompts", type=int, nargs="+", default=PROMPTS, help="tokens of a prompt")
    parser.add_argument("--budget", type=float, default=1.5, help="seconds for each row")
    options = parser.parse_args()
    machine.prepare()
    found, notes = run(SHAPES, tuple(options.tokens), tuple(options.prompts), options.budget)
    print(report(found, machine.describe(), notes))


if __name__ == "__main__":
    main()
