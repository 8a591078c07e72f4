"""One table: our figure beside the baseline's, the ratio that was wanted, and the distance to the machine's limit."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

HEADER = ("what", "ours", "baseline", "ratio", "wanted", "of the limit", "wanted", "")


@dataclass(frozen=True)
class Row:
    """One comparison.

    Attributes:
        what: what was done, "linear M=1 5632x2048, scale per channel".
        ours: our figure with its unit.
        baseline: the other side's, with its name.
        ratio: how many times better (`at_most`: how many times the baseline's) ours is; None where nothing compares.
        wanted: the ratio to reach (`at_most`: not to exceed); None where nothing is asked for.
        at_most: whether a smaller ratio is better.
        limit: ours as a part of what the machine can do, None where that is unknown.
        limit_name: which limit that is.
        wanted_limit: the part to reach.
    """

    what: str
    ours: str
    baseline: str
    ratio: float | None
    wanted: float | None = None
    at_most: bool = False
    limit: float | None = None
    limit_name: str = ""
    wanted_limit: float | None = None

    @property
    def met(self) -> bool | None:
        """Whether everything that was wanted was reached; None where nothing was."""
        checks = []
        if self.wanted is not None and self.ratio is not None:
            checks.append(self.ratio <= self.wanted if self.at_most else self.ratio >= self.wanted)
        if self.wanted_limit is not None and self.limit is not None:
            checks.append(self.limit >= self.wanted_limit)
        return all(checks) if checks else None

    def cells(self) -> tuple[str, ...]:
        sense = "≤" if self.at_most else "≥"
        return (
            self.what,
            self.ours,
            self.baseline,
            "" if self.ratio is None else f"{self.ratio:.2f}",
            "" if self.wanted is None else f"{sense} {self.wanted:.2f}",
            "" if self.limit is None else f"{self.limit:.0%} {self.limit_name}".rstrip(),
            "" if self.wanted_limit is None else f"≥ {self.wanted_limit:.0%}",
            {None: "", True: "ok", False: "MISSED"}[self.met],
        )


def not_run(what: str, why: str) -> Row:
    """The row of what could not be measured."""
    return Row(what, "", f"not run: {why}", None)


def text(rows: Iterable[Row]) -> str:
    """The rows in aligned columns, for a terminal."""
    lines = [HEADER, *(row.cells() for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(HEADER))]
    padded = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    return "\n".join([padded[0], "-" * max(map(len, padded)), *padded[1:]])


def report(rows: Iterable[Row], machine: Mapping[str, str], notes: Iterable[str] = ()) -> str:
    """What a terminal shows: the machine, the rows, and what to know about them."""
    described = [f"{key}: {value}" for key, value in machine.items()]
    return "\n".join([*described, "", text(rows), "", *notes])


def markdown(rows: Sequence[Row], machine: Mapping[str, str], title: str, notes: Sequence[str] = ()) -> str:
    """A page with the machine and the rows."""
    lines = [f"# {title}", "", "| | |", "|---|---|", *(_line((key, value)) for key, value in machine.items()), ""]
    lines += [_line(HEADER), "|" + "---|" * len(HEADER), *(_line(row.cells()) for row in rows), ""]
    if notes:
        lines += [*(f"- {note}" for note in notes), ""]
    return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def write(path: Path, page: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")
