"""What both parts of the report are written with: counts of calls, ranges of scales, aligned columns."""

from __future__ import annotations

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


def table(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Lines with aligned columns; the first row is the header."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return lines


def counts(values: Mapping[str, int]) -> str:
    """ "name count, …", by name."""
    return ", ".join(f"{name} {count}" for name, count in sorted(values.items()))
