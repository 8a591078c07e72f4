"""The part of the report about attention and caches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ..modules.handler import Reason, Row, Why
from .table import call_counts, counts, format_range, min_max, table


@dataclass(frozen=True)
class AttentionReport:
    """One attention module.

    Attributes:
        name: qualified name.
        type: its class.
        quantized: whether it computes in FP8 now, or writes to an FP8 cache.
        reason: why not, or what of it stays in high precision (or "selected").
        activations: "static" or "dynamic", "cache only" where products are in high precision, "measuring", or "".
        scales: the static scales by name, smallest and largest.
        cached: layers of caches that became FP8 for it.
        cache_refused: why others stayed in high precision, with counts.
        kernels: calls by backend.
        fallbacks: calls that were not made in FP8, or made another way, by "backend: reason".
        scheme: how it is scaled and computed; empty in high precision.
    """

    name: str
    type: str
    quantized: bool
    reason: str
    activations: str = ""
    scales: dict[str, tuple[float, float]] = field(default_factory=dict)
    cached: int = 0
    cache_refused: dict[str, int] = field(default_factory=dict)
    kernels: dict[str, int] = field(default_factory=dict)
    fallbacks: dict[str, int] = field(default_factory=dict)
    scheme: str = ""

    def __repr__(self) -> str:
        state = f"FP8, {self.activations}" if self.quantized else f"high precision ({self.reason})"
        return f"<AttentionReport: {self.name}, {self.type}: {state}>"


def attention_report(
    name: str, type_name: str, why: Why, row: Row | None, phase: str, bypassed: str = ""
) -> AttentionReport:
    """The row of one attention module; `phase` says "measuring" while it is, `bypassed` what runs in its place."""
    reason = bypassed or str(why)
    if row is not None and row.remark:
        reason = row.remark if reason == Reason.SELECTED.value else f"{reason}; {row.remark}"
    if row is None:
        measuring = why.reason is Reason.SELECTED and not bypassed
        return AttentionReport(name, type_name, False, phase if measuring else reason, phase if measuring else "")
    kernels, fallbacks = call_counts(row.record)
    return AttentionReport(
        name,
        type_name,
        bool(row.activations),
        reason,
        row.activations,
        {key: min_max(scale) for key, scale in row.scales.items()},
        row.cached,
        row.cache_refused,
        kernels,
        fallbacks,
        row.scheme,
    )


def attention_lines(rows: Sequence[AttentionReport]) -> list[str]:
    """The rows as a table."""
    header = ("attention", "type", "FP8", "activations", "scales", "FP8 caches", "kernels", "reason")
    mixed = len({row.scheme for row in rows if row.quantized}) > 1
    lines = table([(*header, "scheme") if mixed else header, *(_cells(row, mixed) for row in rows)])
    cached = sum(row.activations == "cache only" for row in rows)
    total = f"{sum(row.quantized for row in rows) - cached} of {len(rows)} attention modules in FP8"
    lines.append(f"{total}, {cached} with the cache alone" if cached else total)
    for row in rows:
        lines += [f"{row.name}: {reason} ({count})" for reason, count in (row.fallbacks | row.cache_refused).items()]
    return lines


def lists_lines(lists: Mapping[str, tuple[bool, str]]) -> list[str]:
    """Which operations of attention the lists of a file of INC's select, by INC's names, as one line."""
    told = [f"{kind} {'on' if on else 'off'} ({why})" for kind, (on, why) in lists.items()]
    return [f"attention by INC's lists: {', '.join(told)}"] if told else []


def _cells(row: AttentionReport, with_scheme: bool) -> tuple[str, ...]:
    scales = ", ".join(f"{key.removesuffix('_scale')} {format_range(pair)}" for key, pair in row.scales.items())
    yes = "yes" if row.quantized else "no"
    reason = "" if row.reason == Reason.SELECTED.value else row.reason
    cells = (row.name, row.type, yes, row.activations, scales, str(row.cached or ""), counts(row.kernels), reason)
    return (*cells, row.scheme) if with_scheme else cells
