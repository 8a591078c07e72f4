"""What the self-test found: a row a case, as a table for people and as plain values for machines."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

from ..report.table import table

PASSED, FAILED, REFUSED = "pass", "FAIL", "refused"
_HEADER = ("operator", "format", "case", "ran on", "differs by", "at most", "µs", "result")


@dataclass(frozen=True)
class Row:
    """What became of a case.

    Attributes:
        operator, fp8_config, case: which one it is.
        result: `PASSED`, `FAILED` (too far off, or an error), or `REFUSED` by the backend that was asked for.
        kernel: the backend that ran; empty where none did.
        why: why no kernel of the device ran, or one took a longer way, or the error; empty where one ran as it should.
        difference: the largest, in `unit`; None where nothing ran.
        bound: what is allowed, in `unit`.
        unit: "codes" or "values" that differ, or "ulps": units in the last place of bfloat16.
        microseconds: a second call took; None where nothing ran.
    """

    operator: str
    fp8_config: str
    case: str
    result: str
    kernel: str
    why: str
    difference: float | None
    bound: float
    unit: str
    microseconds: float | None


@dataclass(frozen=True)
class SelfTestReport:
    """The result of `selftest`; `print` shows it as a table.

    Attributes:
        device: that the operators ran on.
        target: whose number formats were used.
        backend: the one that was forced, or None.
        missing: why the device's kernels are not there; None if they are, or if there are none to be had.
        versions: of the machine's software and hardware.
        rows: a row a case.
    """

    device: str
    target: str
    backend: str | None
    missing: str | None
    versions: dict[str, str]
    rows: list[Row]

    @property
    def ok(self) -> bool:
        """Whether nothing failed, the device's kernels are there, and not everything was refused."""
        results = Counter(row.result for row in self.rows)
        return not results[FAILED] and results[PASSED] > 0 and self.missing is None

    @property
    def failures(self) -> list[Row]:
        return [row for row in self.rows if row.result == FAILED]

    @property
    def kernels(self) -> dict[str, int]:
        """How many cases ran on which backend."""
        return dict(Counter(row.kernel for row in self.rows if row.kernel))

    @property
    def summary(self) -> str:
        """One line: how many cases passed, failed and were refused, and on which backends they ran."""
        results = Counter(row.result for row in self.rows)
        counts = [f"{results[PASSED]} passed", f"{results[FAILED]} failed"]
        counts += [f"{results[REFUSED]} refused"] if results[REFUSED] else []
        ran = ", ".join(f"{name} {count}" for name, count in sorted(self.kernels.items())) or "nothing"
        lacking = f"; its kernels are missing: {self.missing}" if self.missing else ""
        return f"{'OK' if self.ok else 'NOT OK'} on {self.device}: {', '.join(counts)}; ran on: {ran}{lacking}"

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as `optimum-cli fp8 selftest --json` writes them; an infinite difference is the text "inf"."""
        rows = [{**asdict(row), "difference": _plain(row.difference)} for row in self.rows]
        return {**asdict(self), "rows": rows, "ok": self.ok, "summary": self.summary}

    def __str__(self) -> str:
        facts = {
            **self.versions,
            "device": self.device,
            "target": self.target,
            "backend": self.backend or "as the device's own calls choose",
        }
        width = max(map(len, facts))
        notes: dict[str, int] = {}
        rows = [_cells(row, notes) for row in self.rows]
        return "\n".join(
            [
                *(f"{label.ljust(width)}  {value}" for label, value in facts.items()),
                "",
                *(table([_HEADER, *rows]) if rows else []),
                "",
                *(f"[{number}] {note}" for note, number in notes.items()),
                *([""] if notes else []),
                self.summary,
            ]
        )


def _plain(difference: float | None) -> float | str | None:
    return "inf" if difference == math.inf else difference


def _cells(row: Row, notes: dict[str, int]) -> tuple[str, ...]:
    """A row of the table; what does not fit into it becomes a note."""
    mark = f" [{notes.setdefault(row.why, len(notes) + 1)}]" if row.why else ""
    differs = "-" if row.difference is None else f"{row.difference:.3g} {row.unit}"
    time = "-" if row.microseconds is None else f"{row.microseconds:.0f}"
    ran = f"{row.kernel or 'nothing'}{mark}"
    return row.operator, row.fp8_config, row.case, ran, differs, f"{row.bound:.3g}", time, row.result
