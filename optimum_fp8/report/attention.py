"""The part of the report about attention and caches, and what both parts are written with."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from .. import ops
from ..cache import cache_record
from ..modules.attention import plan_of
from ..modules.attention_scales import scales_of
from ..state import FP8State


@dataclass(frozen=True)
class AttentionReport:
    """One attention module.

    Attributes:
        name: qualified name.
        type: its class.
        quantized: whether it computes in FP8, or writes to an FP8 cache.
        reason: why not (or "selected").
        activations: "static" or "dynamic", "cache only" where products are in high precision, "measuring", or "".
        scales: the static scales by parameter name, smallest and largest.
        cached: layers of caches that became FP8 for it.
        cache_refused: why others stayed in high precision, with counts.
        kernels: calls by backend.
        fallbacks: calls that were not made in FP8, or made another way, by "backend: reason".
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


def attention_reports(model: nn.Module, state: FP8State | None) -> list[AttentionReport]:
    """A row for each attention module that was decided about."""
    return [
        _report(model.get_submodule(decision.name), decision.name, decision.type, decision.reason)
        for decision in (state.attention if state is not None else ())
    ]


def _report(module: nn.Module, name: str, kind: str, reason: str) -> AttentionReport:
    plan = plan_of(module)
    if plan is None or plan.recipe is None:
        measuring = reason == "selected"
        return AttentionReport(name, kind, False, "measuring" if measuring else reason, "measuring" * measuring)
    recipe, record, (kernels, fallbacks) = plan.recipe, cache_record(module), counted(plan.owner)
    activations = "cache only" if not recipe.rounds else "static" if recipe.rule is None else "dynamic"
    scales = {key: extremes(scale) for key, scale in scales_of(module).items()}
    return AttentionReport(
        name, kind, True, reason, activations, scales, record.layers, dict(record.refused), kernels, fallbacks
    )


def attention_lines(rows: Sequence[AttentionReport]) -> list[str]:
    """The rows as a table."""
    header = ("attention", "type", "FP8", "activations", "scales", "FP8 caches", "kernels", "reason")
    lines = table([header, *(_row(row) for row in rows)])
    lines.append(f"{sum(row.quantized for row in rows)} of {len(rows)} attention modules in FP8")
    for row in rows:
        lines += [f"{row.name}: {reason} ({count})" for reason, count in (row.fallbacks | row.cache_refused).items()]
    return lines


def _row(row: AttentionReport) -> tuple[str, ...]:
    scales = ", ".join(f"{key.removesuffix('_scale')} {written(pair)}" for key, pair in row.scales.items())
    yes = "yes" if row.quantized else "no"
    reason = "" if row.quantized else row.reason
    return (row.name, row.type, yes, row.activations, scales, str(row.cached or ""), counts(row.kernels), reason)


def counted(owner: int) -> tuple[dict[str, int], dict[str, int]]:
    """What an owner's calls ran on by backend, and those that were refused by "backend: reason"."""
    record, kernels, fallbacks = ops.calls(owner), Counter[str](), Counter[str]()
    for (_, backend), count in record.kernels.items():
        kernels[backend] += count
    for (_, backend, reason), count in record.fallbacks.items():
        fallbacks[f"{backend}: {reason}"] += count
    return dict(kernels), dict(fallbacks)


def extremes(scale: torch.Tensor) -> tuple[float, float]:
    """The smallest and the largest of a scale's values (NaN where they are elsewhere)."""
    if scale.device.type == "meta":
        return (float("nan"), float("nan"))
    return (float(scale.min()), float(scale.max()))


def written(pair: tuple[float, float]) -> str:
    """The extremes of a scale, in four digits."""
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
