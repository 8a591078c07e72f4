"""quantization_report: which modules really run in FP8, with which scales, on which kernels, and why others do not."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import nn

from .. import ops
from ..formats import is_fp8
from ..lifecycle import FP8State, Phase, state_of
from ..modules.handler import Row, converted_modules, find_all
from .attention import AttentionReport, attention_lines, attention_report
from .table import call_counts, counts, format_range, min_max, table


@dataclass(frozen=True)
class ModuleReport:
    """One candidate module.

    Attributes:
        name: qualified name.
        type: class of the original module.
        quantized: whether it is an FP8 module now.
        reason: why not (or "selected").
        activations: "static", "dynamic", "weight_only", "measuring", or "" in high precision.
        weight_scale: smallest and largest, or None.
        input_scale: the static scale, or None.
        kernels: calls by backend.
        fallbacks: calls that a backend refused, by "backend: reason".
        scheme: how it is scaled and computed; empty in high precision.
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


@dataclass(frozen=True)
class QuantizationReport:
    """What became of a model: `str(report)` is a table, `report.to_dict()` is JSON-able.

    Attributes:
        modules: the candidates.
        phase: "high precision", "measuring", "converted", …
        attention: attention modules, where a configuration asks for them.
        share: of all values of the model's parameters (candidates or not), how many are stored in FP8, 0 to 1.
    """

    modules: list[ModuleReport]
    phase: str
    attention: list[AttentionReport] = field(default_factory=list)
    share: float = 0.0

    @property
    def quantized(self) -> list[ModuleReport]:
        return [module for module in self.modules if module.quantized]

    @property
    def kernels(self) -> dict[str, int]:
        """Calls by backend, over all modules."""
        return dict(sum((Counter(row.kernels) for row in self._rows), Counter()))

    @property
    def fallbacks(self) -> dict[str, int]:
        """Refused calls by "backend: reason", over all modules."""
        return dict(sum((Counter(row.fallbacks) for row in self._rows), Counter()))

    @property
    def _rows(self) -> list[ModuleReport | AttentionReport]:
        return [*self.modules, *self.attention]

    def to_dict(self) -> dict[str, Any]:
        attention = {"attention": [asdict(module) for module in self.attention]} if self.attention else {}
        modules = [asdict(module) for module in self.modules]
        return {"phase": self.phase, "share": self.share, "modules": modules, **attention}

    def __str__(self) -> str:
        mixed = len({module.scheme for module in self.quantized}) > 1
        header = ("module", "type", "FP8", "activations", "weight scale", "input scale", "kernels", "reason")
        lines = table([(*header, "scheme") if mixed else header, *(_cells(module, mixed) for module in self.modules)])
        missing = ops.why_reference() if "reference" in self.kernels else None
        if missing:
            lines.append(f"the reference runs, which is slow: {missing}")
        if self.attention:
            lines += ["", *attention_lines(self.attention)]
        silent = [module.name for module in self.quantized if not module.kernels]
        if silent and self.kernels:
            lines.append(f"{len(silent)} FP8 modules made no call although others did: {', '.join(silent[:8])}")
        lines.append(
            f"{len(self.quantized)} of {len(self.modules)} candidate modules in FP8, with {self.share:.1%} of all "
            f"parameters; state: {self.phase}; calls: {counts(self.kernels) or 'none yet'}; fallbacks: "
            f"{counts(self.fallbacks) or 'none'}"
        )
        return "\n".join(lines)


def quantization_report(model: nn.Module) -> QuantizationReport:
    """Report on every candidate module of `model`, quantized or not; calls are counted since the conversion."""
    model = getattr(model, "_orig_mod", model)  # what torch.compile was given
    state = state_of(model)
    if state is None:
        return _without_state(model)
    modules, phase = dict(model.named_modules()), state.phase.value
    rows: list[ModuleReport] = []
    attention: list[AttentionReport] = []
    for each in state.decisions:
        module = modules.get(each.name)
        row = each.handler.row(module) if module is not None else None
        if each.handler.family.replaced:
            rows.append(_module_report(each.name, each.type, each.reason, row, state))
        else:
            attention.append(attention_report(each.name, each.type, each.reason, row, phase))
    return QuantizationReport(rows, phase, attention, _share_in_fp8(model))


def _without_state(model: nn.Module) -> QuantizationReport:
    """A model that nothing was done to, or a part of one."""
    converted = {name: entry for name, entry in converted_modules(model).items() if entry[1].family.replaced}
    rows = [
        ModuleReport(name, type(module).__name__, False, "not prepared")
        for name, (module, handler) in find_all(model).items()
        if handler.family.replaced and name not in converted
    ]
    for name, (module, handler) in converted.items():
        rows.append(_module_report(name, type(module).__name__, "selected", handler.row(module), None))
    phase = "converted" if converted else "high precision"
    return QuantizationReport(rows, phase, [], _share_in_fp8(model))


def _share_in_fp8(model: nn.Module) -> float:
    sizes = [(parameter.numel(), is_fp8(parameter.dtype)) for parameter in model.parameters()]
    return sum(size for size, in_fp8 in sizes if in_fp8) / max(1, sum(size for size, _ in sizes))


def _module_report(name: str, type_name: str, reason: str, row: Row | None, state: FP8State | None) -> ModuleReport:
    measuring = state is not None and state.phase is Phase.MEASURING
    if row is None:
        return ModuleReport(name, type_name, False, "measuring" if reason == "selected" else reason)
    kernels, fallbacks = call_counts(row.record)
    scales = {key: min_max(scale) for key, scale in row.scales.items()}
    return ModuleReport(
        name,
        type_name,
        True,
        "selected",
        "measuring" if measuring else row.activations,
        scales.get("weight_scale"),
        scales["input_scale"][0] if "input_scale" in scales else None,
        kernels,
        fallbacks,
        row.scheme,
    )


def _cells(module: ModuleReport, with_scheme: bool) -> tuple[str, ...]:
    weight_scale = "" if module.weight_scale is None else format_range(module.weight_scale)
    cells = (
        module.name,
        module.type,
        "yes" if module.quantized else "no",
        module.activations,
        weight_scale,
        "" if module.input_scale is None else f"{module.input_scale:.4g}",
        counts(module.kernels),
        "" if module.quantized else module.reason,
    )
    return (*cells, module.scheme) if with_scheme else cells
