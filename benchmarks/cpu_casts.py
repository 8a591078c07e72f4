"""Casts to FP8 and back, and the range of a tensor, in bytes a second beside the machine's copying.

Each call reads another copy of the input, so that it comes from memory. A cast moves what it reads and what it writes;
the limit is torch's copy of the same input, in bytes read and written, and for a range (which writes nothing) reading
the input. torch copies with ordinary stores, as our casts do, for what they write is read soon: stores that pass the
caches by copy 1.1 to 1.3 times as fast.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from optimum_fp8 import ops

from . import machine, timing
from .table import Row

SHAPE = (2048, 5632)  # its results are small enough for malloc to reuse their pages
FULL_SCALE, FP8 = 448.0, torch.float8_e4m3fn
WANTED_OF_MEMORY = 0.6


Copies = timing.Rotation[torch.Tensor]


@dataclass(frozen=True)
class Case:
    """One operation: how to run it, what torch offers for the same, and the bytes it moves for each element."""

    what: str
    ours: Callable[[], object]
    theirs: Callable[[], object]
    bytes_each: int
    writes: bool = True


def to_fp8(values: Copies, scale: torch.Tensor) -> torch.Tensor:
    return ops.cast_to_fp8(values.take(), scale, FP8, FULL_SCALE)


def to_fp8_by_range(values: Copies, table: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return ops.cast_to_fp8_by_range(values.take(), table, per_row=True, dtype=FP8, full_scale=FULL_SCALE)


def from_fp8(codes: Copies, scale: torch.Tensor) -> torch.Tensor:
    return ops.cast_from_fp8(codes.take(), scale, torch.bfloat16)


def maxabs(values: Copies, group: int) -> torch.Tensor:
    return ops.maxabs(values.take(), group=group)


def dynamic(values: Copies, group: int) -> torch.Tensor:
    return ops.dynamic_scale(
        values.take(),
        group=group,
        divisor=FULL_SCALE,
        rounding="pow2",
        fp8_config="E4M3",
        target="cpu",
        hp_dtype=torch.bfloat16,
    )


def torch_cast(copies: Copies, dtype: torch.dtype) -> torch.Tensor:
    return copies.take().to(dtype)


def torch_range(values: Copies, group: int) -> torch.Tensor:
    return values.take().abs().amax(group or (0, 1))


def cases(values: Copies, codes: Copies, rows: int) -> list[Case]:
    """The operations on bfloat16 `values` and FP8 `codes` of so many rows."""
    scales = {
        "tensor": torch.full((1,), 2.0**-6),
        "channel": torch.full((rows, 1), 2.0**-6),
        "token": torch.linspace(1, 2, rows).mul(2.0**-6).unsqueeze(-1),
    }
    found = []
    for name, scale in scales.items():
        what = f"cast bf16 to FP8, scale per {name}"
        found.append(Case(what, partial(to_fp8, values, scale), partial(torch_cast, values, FP8), 3))
    for name in ("tensor", "channel"):
        what, theirs = f"cast FP8 to bf16, scale per {name}", partial(torch_cast, codes, torch.bfloat16)
        found.append(Case(what, partial(from_fp8, codes, scales[name]), theirs, 3))
    what, table = "cast bf16 to FP8, scale from each row's range", torch.full((1 << 15,), 2.0**-6)
    found.append(Case(what, partial(to_fp8_by_range, values, table), partial(torch_cast, values, FP8), 3))
    for group, name in ((0, "tensor"), (-1, "token")):
        theirs = partial(torch_range, values, group)
        found.append(Case(f"maxabs per {name}", partial(maxabs, values, group), theirs, 2, writes=False))
        found.append(Case(f"dynamic scale per {name}", partial(dynamic, values, group), theirs, 2, writes=False))
    return found


def run(budget: float = 1.5, shape: tuple[int, int] = SHAPE) -> tuple[list[Row], list[str]]:
    """The rows of the table, and what to know about the limits."""
    value = torch.randn(shape).bfloat16()
    size = value.numel()
    copies = machine.cold_copies(2 * size)
    values = timing.Rotation([value.clone() for _ in range(copies)])
    codes = timing.Rotation([value.to(FP8) for _ in range(machine.cold_copies(size))])
    read, name = machine.reader()
    target, limits, found = torch.empty_like(value), {}, []
    for case in cases(values, codes, shape[0]):
        limit = (lambda: target.copy_(values.take())) if case.writes else (lambda: read(values.take()))
        limit_bytes = (4 if case.writes else 2) * size
        times = timing.interleave({"ours": case.ours, "theirs": case.theirs, "limit": limit}, budget=budget, least=4)
        moved, ours, theirs = size * case.bytes_each, timing.median(times["ours"]), timing.median(times["theirs"])
        limits["copying" if case.writes else "reading"] = limit_bytes / timing.median(times["limit"]) / 1e9
        found.append(
            Row(
                case.what,
                f"{moved / ours / 1e9:.2f} GB/s",
                f"torch {moved / theirs / 1e9:.2f} GB/s",
                timing.ratio(times["theirs"], times["ours"]),
                limit=timing.ratio(times["limit"], times["ours"]) * moved / limit_bytes,
                limit_name="copying" if case.writes else "reading",
                wanted_limit=WANTED_OF_MEMORY,
            )
        )
    speeds = ", ".join(f"{kind} {speed:.1f} GB/s" for kind, speed in limits.items())
    return found, [f"casts: {speeds} ({name}); bytes read and written are both counted"]
