"""The part of the report about modules with parameters: candidates, and what was none."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from ..modules.handler import Row, spoken_type
from .table import call_counts, counts, format_range, format_share, min_max, name_pattern, table

_LONG = 40  # rows from which on those that differ in numbers alone stand together
_SMALL = 0.01  # share of the parameters below which kinds of modules that are no candidates stand together


@dataclass(frozen=True)
class ModuleReport:
    """One candidate module.

    Attributes:
        name: qualified name.
        type: class of the original module.
        quantized: whether it is an FP8 module now.
        reason: why not (or "selected", or what was done to its weight since).
        activations: "static", "dynamic", "weight_only", "measuring", or "" in high precision.
        weight_scale: smallest and largest, or None (it is offloaded, or there is none).
        input_scale: the static scale, or None.
        kernels: calls by backend.
        fallbacks: calls that a backend refused, by "backend: reason".
        scheme: how it is scaled and computed; empty in high precision.
        type_path: full name of its class.
        parameters: values of its parameters without scales; those it shares with a module before it count there.
        intermediate_scale: of experts, the smallest and the largest static scale of what goes into their last products.
        tokens_of_experts: of experts, how many tokens calibration sent to each; () if that was not measured.
    """

    name: str
    type: str
    quantized: bool
    reason: str
    activations: str = ""
    weight_scale: tuple[float, float] | None = None
    input_scale: float | None = None
    kernels: dict[str, int] = field(default_factory=dict)
    fallbacks: dict[str, int] = field(default_factory=dict)
    scheme: str = ""
    type_path: str = ""
    parameters: int = 0
    intermediate_scale: tuple[float, float] | None = None
    tokens_of_experts: tuple[int, ...] = ()

    @property
    def label(self) -> str:
        """What lists call it."""
        return self.name

    def __repr__(self) -> str:
        state = f"FP8, {self.activations}" if self.quantized else f"high precision ({self.reason})"
        return f"<ModuleReport: {self.name}, {self.type}: {state}>"


@dataclass(frozen=True)
class OtherReport:
    """The modules of one class that hold parameters and were no candidates.

    Attributes:
        names: their qualified names.
        type: their class.
        reason: why they stay in high precision.
        type_path: full name of the class.
        parameters: values of their parameters, as for candidates.
    """

    names: list[str]
    type: str
    reason: str
    type_path: str
    parameters: int

    @property
    def label(self) -> str:
        """What lists call them."""
        return spoken_type(self.type_path)

    def __repr__(self) -> str:
        return f"<OtherReport: {len(self.names)} {self.label}, {self.parameters:,} parameters>"


def module_report(
    name: str,
    types: Sequence[str],
    reason: str,
    row: Row | None,
    parameters: int,
    *,
    phase: str,
    tokens: tuple[int, ...] = (),
) -> ModuleReport:
    """The row of one candidate, of which `types` are the names of its class, and `tokens` those of its experts.

    `phase` is where the model stands, as its state calls it.
    """
    type_name, type_path = types[0], types[-1]
    if row is None:
        reason = phase if reason == "selected" else reason
        known = {"type_path": type_path, "parameters": parameters, "tokens_of_experts": tokens}
        return ModuleReport(name, type_name, False, reason, **known)  # type: ignore[arg-type]
    kernels, fallbacks = call_counts(row.record)
    scales = {key: min_max(scale) for key, scale in row.scales.items() if not scale.is_meta}
    return ModuleReport(
        name,
        type_name,
        True,
        row.remark or "selected",
        phase if phase == "measuring" else row.activations,
        scales.get("weight_scale"),
        scales["input_scale"][0] if "input_scale" in scales else None,
        kernels,
        fallbacks,
        row.scheme,
        type_path,
        parameters,
        scales.get("intermediate_scale"),
        tokens,
    )


def tokens_line(modules: Sequence[ModuleReport]) -> str:
    """What calibration sent to the experts of all modules, in a sentence; empty where that was not measured."""
    counted = [tokens for module in modules for tokens in module.tokens_of_experts]
    if not counted:
        return ""
    none = f"; none to {counted.count(0)} of {len(counted)}" if 0 in counted else ""
    return f"calibration sent {min(counted)} to {max(counted)} tokens to each of {len(counted)} experts{none}"


def module_lines(modules: Sequence[ModuleReport], others: Sequence[OtherReport], parameters: int) -> list[str]:
    """The rows as a table; in a long one, those that differ in numbers alone stand together.

    Args:
        modules: the candidates.
        others: what was none.
        parameters: values of all parameters of the model.
    """
    mixed = len({module.scheme for module in modules if module.quantized}) > 1
    header = ("module", "type", "FP8", "parameters", "activations", "weight scale", "input scale", "kernels", "reason")
    groups: dict[tuple[str, ...], list[ModuleReport]] = {}
    for each in modules:
        name = name_pattern(each.name) if len(modules) > _LONG else each.name
        key = (name, each.type_path, str(each.quantized), each.reason, each.activations, each.scheme)
        groups.setdefault(key, []).append(each)
    rows = [_cells(name, group, parameters) for (name, *_), group in groups.items()]
    rest = [_other_cells(group, parameters) for group in _by_size(others, parameters)]
    if not mixed:
        return table([header, *rows, *rest])
    with_scheme = [(*row, group[0].scheme) for row, group in zip(rows, groups.values(), strict=True)]
    return table([(*header, "scheme"), *with_scheme, *((*row, "") for row in rest)])


def _cells(name: str, rows: Sequence[ModuleReport], parameters: int) -> tuple[str, ...]:
    """The cells of modules that have all in common but numbers."""
    first, held = rows[0], sum(row.parameters for row in rows)
    return (
        first.name if len(rows) == 1 else f"{name} ({len(rows)})",
        spoken_type(first.type_path),
        "yes" if first.quantized else "no",
        format_share(held, parameters) if held else "shared",
        first.activations,
        _range(value for row in rows for value in row.weight_scale or ()),
        _range(row.input_scale for row in rows if row.input_scale is not None),
        counts(sum((Counter(row.kernels) for row in rows), Counter())),
        "" if first.reason == "selected" else first.reason,
    )


def _range(values: Iterable[float]) -> str:
    known = list(values)
    if not known:
        return ""
    return "nan" if any(map(math.isnan, known)) else format_range((min(known), max(known)))


def _by_size(others: Sequence[OtherReport], parameters: int) -> list[list[OtherReport]]:
    """The largest first; those that hold little together as the last."""
    ordered = sorted(others, key=lambda other: -other.parameters)
    small = [other for other in ordered if other.parameters < _SMALL * parameters]
    return [[other] for other in ordered if other not in small] + ([small] if small else [])


def _other_cells(rows: Sequence[OtherReport], parameters: int) -> tuple[str, ...]:
    names = [name or "the model itself" for row in rows for name in row.names]
    patterns = dict.fromkeys(map(name_pattern, names))
    shown = names[0] if len(names) == 1 else f"{next(iter(patterns))}{', …' * (len(patterns) > 1)} ({len(names)})"
    types = [row.label for row in rows]
    kinds = f"{', '.join(types[:3])}{', …' if len(types) > 3 else ''}"
    share = format_share(sum(row.parameters for row in rows), parameters)
    return (shown, kinds, "no", share, "", "", "", "", ", ".join(dict.fromkeys(row.reason for row in rows)))
