"""quantization_report: which modules really run in FP8, with which scales, on which kernels, and why others do not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import nn

from .. import ops
from ..config import FP8Config
from ..lifecycle import refuse_no_module, state_of, unwrapped
from ..modules.handler import Reason, converted_modules, find_all
from ..selection import of_kinds_asked_for, schemes_of, type_names
from .attention import AttentionReport, attention_lines, attention_report, lists_lines
from .modules import ModuleReport, OtherReport, module_lines, module_report, tokens_line
from .size import Size, size_of
from .table import counts, format_bytes, format_share


@dataclass(frozen=True)
class QuantizationReport:
    """What became of a model: `str(report)` is a table, `report.to_dict()` is JSON-able.

    Attributes:
        modules: the candidates.
        phase: "high precision", "measuring", "converted", …
        attention: attention modules, where a configuration asks for them.
        others: the modules that hold parameters and were no candidates, by class.
        size: parameters, and bytes now and in high precision.
        lists: of a file of INC's: whether its lists select each operation of attention, and why.
    """

    modules: list[ModuleReport]
    phase: str
    attention: list[AttentionReport]
    others: list[OtherReport]
    size: Size
    lists: dict[str, tuple[bool, str]] = field(default_factory=dict)

    @property
    def share(self) -> float:
        """Of all values of the model's parameters (candidates or not), how many are stored in FP8, 0 to 1."""
        return self.size.share

    @property
    def kept(self) -> list[ModuleReport | OtherReport]:
        """What stays in high precision, candidate or not, that with the most parameters first."""
        found: list[ModuleReport | OtherReport] = [module for module in self.modules if not module.quantized]
        found += self.others
        return sorted(found, key=lambda each: -each.parameters)

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
        lists = {"lists": {kind: list(found) for kind, found in self.lists.items()}} if self.lists else {}
        return {
            "phase": self.phase,
            "share": self.share,
            "parameters": self.size.parameters,
            "bytes": self.size.to_dict(),
            "modules": [asdict(module) for module in self.modules],
            "others": [asdict(other) for other in self.others],
            **attention,
            **lists,
        }

    @property
    def _summary(self) -> str:
        return (
            f"{format_share(self.size.in_fp8, self.size.parameters)} of all parameters in FP8; {len(self.quantized)} "
            f"of {len(self.modules)} candidate modules in FP8; state: {self.phase}"
        )

    def __repr__(self) -> str:
        return f"<QuantizationReport: {self._summary}>"

    def __str__(self) -> str:
        lines = [self._summary, _size_line(self.size), ""]
        lines += module_lines(self.modules, self.others, self.size.parameters)
        lines += [line] if (line := tokens_line(self.modules)) else []
        missing = ops.why_reference() if "reference" in self.kernels else None
        if missing:
            lines.append(f"the reference runs, which is slow: {missing}")
        if self.attention:
            lines += ["", *attention_lines(self.attention)]
        lines += lists_lines(self.lists)
        silent = [module.name for module in self.quantized if not module.kernels]
        if silent and self.kernels:
            lines.append(f"{len(silent)} FP8 modules made no call although others did: {', '.join(silent[:8])}")
        lines += ["", f"calls: {counts(self.kernels) or 'none yet'}; fallbacks: {counts(self.fallbacks) or 'none'}"]
        return "\n".join(lines)


def quantization_report(model: nn.Module) -> QuantizationReport:
    """Report on every candidate module of `model`, quantized or not; calls are counted since the conversion."""
    refuse_no_module(model, "quantization_report")
    model = unwrapped(model)
    state, size = state_of(model), size_of(model)
    if state is None:
        return _without_state(model, size)
    modules, phase, counted = dict(model.named_modules()), state.phase.value, state.measurements.tokens_of_experts()
    rows: list[ModuleReport] = []
    attention: list[AttentionReport] = []
    held = _held_by([each.name for each in state.decisions if each.handler.family.replaced], size.held)
    for each in state.decisions:
        module = modules.get(each.name)
        row = each.handler.row(module) if module is not None else None
        if each.handler.family.replaced:
            types, parameters = each.types, held.pop(each.name, 0)
            counts_of = tuple(counted[each.name].tolist()) if each.name in counted else ()
            own = module_report(each.name, types, each.reason, row, parameters, phase=phase, tokens=counts_of)
            rows.append(own)
        else:
            bypassed = each.handler.bypassed(module) if module is not None else ""
            attention.append(attention_report(each.name, each.type, each.why, row, phase, bypassed))
    return QuantizationReport(rows, phase, attention, _others(model, held), size, state.config.operations)


def _without_state(model: nn.Module, size: Size) -> QuantizationReport:
    """A model that nothing was done to, or a part of one."""
    converted = {name: entry for name, entry in converted_modules(model).items() if entry[1].family.replaced}
    found = {name: entry for name, entry in find_all(model).items() if entry[1].family.replaced}
    found = of_kinds_asked_for(found, schemes_of(model, found, FP8Config())) | converted
    held, rows = _held_by(found, size.held), []
    for name, _ in model.named_modules():
        if name in found:
            module, handler = found[name]
            row, reason = (handler.row(module), "selected") if name in converted else (None, "not prepared")
            types, parameters = type_names(module), held.pop(name, 0)
            rows.append(module_report(name, types, reason, row, parameters, phase=""))
    phase = "converted" if converted else "high precision"
    return QuantizationReport(rows, phase, [], _others(model, held), size)


def _held_by(candidates: Iterable[str], held: Mapping[str, int]) -> dict[str, int]:
    """Parameters by the module that stands for them: the candidate they are in, else the module that holds them."""
    known, sums = set(candidates), dict[str, int]()
    for name, count in held.items():
        parts = name.split(".")
        around = (".".join(parts[:depth]) for depth in range(len(parts), 0, -1))
        owner = next((each for each in around if each in known), name)
        sums[owner] = sums.get(owner, 0) + count
    return sums


def _others(model: nn.Module, held: Mapping[str, int]) -> list[OtherReport]:
    """The rows of what holds parameters and was no candidate, by class."""
    names: dict[tuple[Reason, tuple[str, ...]], list[str]] = {}
    known = {name for name, (_, handler) in find_all(model).items() if handler.family.replaced}
    for name in held:  # a module of a known kind that nothing was decided about came later, an adapter say
        reason = Reason.NOT_ASKED_FOR if name in known else Reason.NO_CANDIDATE
        names.setdefault((reason, type_names(model.get_submodule(name))), []).append(name)
    return [
        OtherReport(found, types[0], reason.value, types[-1], sum(held[name] for name in found))
        for (reason, types), found in names.items()
    ]


def _size_line(size: Size) -> str:
    now = f"parameters and buffers: {format_bytes(size.now)}"
    if not size.codes:
        return now
    parts = {"codes": size.codes, "scales": size.scales, "rest": size.rest}
    listed = ", ".join(f"{name} {format_bytes(count)}" for name, count in parts.items())
    return f"{now} ({listed}); in high precision {format_bytes(size.high_precision)}"
