"""quantization_report: which modules really run in FP8, with which scales, on which kernels, and why others do not."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from torch import nn

from .. import ops
from ..formats import is_fp8
from ..modules import FP8Module, fp8_modules
from ..selection import QUANTIZABLE
from ..state import state_of
from .attention import AttentionReport, attention_lines, attention_reports, counted, counts, extremes, table, written


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
        header = ("module", "type", "FP8", "activations", "weight scale", "input scale", "kernels", "reason")
        lines = table([header, *(_row(module) for module in self.modules)])
        missing = ops.missing("cpu")
        if missing and "reference" in self.kernels:
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
    state, modules = state_of(model), dict(model.named_modules())
    converted = fp8_modules(model)
    if state is None:
        named = {name: module for name, module in modules.items() if isinstance(module, QUANTIZABLE)}
        rows = [ModuleReport(name, type(module).__name__, False, "not prepared") for name, module in named.items()]
        rows += [_fp8_report(name, type(module).__name__, module) for name, module in converted.items()]
        phase = "converted" if converted else "high precision"
        return QuantizationReport(rows, phase, attention_reports(model, None), _share_in_fp8(model))
    rows = []
    for decision in state.decisions:
        module = modules.get(decision.name)
        if isinstance(module, FP8Module):
            row = _fp8_report(decision.name, decision.type, module)
            rows.append(replace(row, activations="measuring") if state.phase == "measuring" else row)
        else:
            reason = "measuring" if decision.selected else decision.reason
            rows.append(ModuleReport(decision.name, decision.type, False, reason))
    return QuantizationReport(rows, state.phase, attention_reports(model, state), _share_in_fp8(model))


def _share_in_fp8(model: nn.Module) -> float:
    sizes = [(parameter.numel(), is_fp8(parameter.dtype)) for parameter in model.parameters()]
    return sum(size for size, in_fp8 in sizes if in_fp8) / max(1, sum(size for size, _ in sizes))


def _fp8_report(name: str, kind: str, module: FP8Module) -> ModuleReport:
    kernels, fallbacks = counted(module.owner)
    return ModuleReport(
        name,
        kind,
        True,
        "selected",
        module.activations,
        extremes(module.weight_scale),
        None if module.input_scale is None else extremes(module.input_scale)[0],
        kernels,
        fallbacks,
    )


def _row(module: ModuleReport) -> tuple[str, ...]:
    weight_scale = "" if module.weight_scale is None else written(module.weight_scale)
    return (
        module.name,
        module.type,
        "yes" if module.quantized else "no",
        module.activations,
        weight_scale,
        "" if module.input_scale is None else f"{module.input_scale:.4g}",
        counts(module.kernels),
        "" if module.quantized else module.reason,
    )
