"""What both parts of the report are written with: counts of calls, ranges of scales, aligned columns."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence

import torch

from .. import ops


def call_counts(record: ops.CallRecord) -> tuple[dict[str, int], dict[str, int]]:
    """What a module's calls ran on by backend, and those that were refused by "backend: reason"."""
    kernels, fallbacks = Counter[str](), Counter[str]()
    for (_, backend), count in record.kernels.items():
        kernels[backend] += count
    for (_, backend, reason), count in record.fallbacks.items():
        fallbacks[f"{backend}: {reason}"] += count
    return dict(kernels), dict(fallbacks)


def min_max(scale: torch.Tensor) -> tuple[float, float]:
    """The smallest and the largest of a scale's values (NaN where they are elsewhere)."""
    if scale.device.type == "meta":
        return (float("nan"), float("nan"))
    return (float(scale.min()), float(scale.max()))


def format_range(pair: tuple[float, float]) -> str:
    """The smallest and the largest value of a scale, in four digits."""
    return f"{pair[0]:.4g}" if pair[0] == pair[1] else f"{pair[0]:.4g} … {pair[1]:.4g}"


def format_share(part: int, whole: int) -> str:
    """A part of a whole in percent; what is there never reads as nothing, nor less than all as all."""
    share = part / max(1, whole)
    if 0 < share < 0.001:
        return "<0.1%"
    return ">99.9%" if 0.9995 <= share < 1 else f"{share:.1%}"


def format_bytes(count: int) -> str:
    """A number of bytes in the unit that suits it."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} B"


def name_pattern(name: str) -> str:
    """A qualified name without its numbers: "layers.*.mlp" stands for the modules of all layers."""
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", name)


def table(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Lines with aligned columns; the first row is the header."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return lines


def counts(values: Mapping[str, int]) -> str:
    """ "name count, …", by name."""
    return ", ".join(f"{name} {count}" for name, count in sorted(values.items()))
