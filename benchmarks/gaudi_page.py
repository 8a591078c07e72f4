"""The tables and the picture of docs/gaudi-accuracy.md, from the results of `gaudi_accuracy.py`."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from .dot_plot import Dot, Panel, drawn

DOCS = Path(__file__).parents[1] / "docs"
PAGE, PICTURE = DOCS / "gaudi-accuracy.md", DOCS / "gaudi-accuracy.svg"
TARGETS = {"gaudi2": "gaudi2", "gaudi3": "gaudi3", "cpu": "cuda, cpu"}
SCHEMES = ("static", "dynamic")
MISSING = "–"

Row = dict[str, Any]
Results = dict[str, Any]


def both(row: Row) -> str:
    """Perplexity and divergence."""
    return f"{row['perplexity']:.2f} / {row['divergence']:.4f}"


def markdown(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = ["| " + " | ".join(cells) + " |" for cells in (header, *rows)]
    return "\n".join([lines[0], "|" + "---|" * (lines[0].count("|") - 1), *lines[1:]])


def select(results: Results, **wanted: Any) -> list[Row]:
    return [row for row in results["rows"] if all(row[key] == value for key, value in wanted.items())]


def table(results: Results, cell: Callable[[Row], str], **wanted: Any) -> str:
    """A line for each method and a column for each scheme and target."""
    rows = select(results, **wanted)
    columns = [(scheme, target) for scheme in SCHEMES for target in TARGETS]
    cells = {(row["method"], row["scheme"], row["target"]): cell(row) for row in rows}
    methods = dict.fromkeys(row["method"] for row in rows)
    header = ["method", *(f"{scheme}, {TARGETS[target]}" for scheme, target in columns)]
    return markdown(
        header, ([f"`{method}`", *(cells.get((method, *column), MISSING) for column in columns)] for method in methods)
    )


def tables(results: Results) -> dict[str, str]:
    """By the names they have in the page."""
    plain = {"outliers": "none", "attention": False}
    names = {"E4M3": plain | {"fp8_config": "E4M3"}, "E5M2": plain | {"fp8_config": "E5M2"}}
    for kind in ("channel", "spikes"):
        names[kind] = {"outliers": kind}
    names["attention E4M3"] = {"outliers": "none", "attention": True, "fp8_config": "E4M3"}
    names["attention E5M2"] = {"outliers": "none", "attention": True, "fp8_config": "E5M2"}
    return {name: table(results, both, **wanted) for name, wanted in names.items()} | {"bfloat16": original(results)}


def original(results: Results) -> str:
    header = ["outliers", "perplexity in bfloat16"]
    return markdown(header, ([kind, f"{found:.2f}"] for kind, found in results["bfloat16"].items()))


def filled(page: str, results: Results) -> str:
    """The page with each table between the marks of its name."""
    for name, text in tables(results).items():
        mark = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        page, count = mark.subn(lambda match, text=text: f"{match[1]}\n{text}\n{match[2]}", page)
        if count != 1:
            raise ValueError(f"{PAGE.name}: expected one place for the table {name!r}, found {count}")
    return page


def picture(results: Results) -> str:
    """The divergence in E4M3, a panel for each kind of outliers."""
    titles = {"none": "as it is", "channel": "a channel × 3000", "spikes": "spikes × 3000"}
    panels = [Panel(title, [*_dots(results, kind)]) for kind, title in titles.items()]
    return drawn(panels, "KL from bfloat16 in nats, E4M3; filled: static, hollow: dynamic", list(TARGETS.values()))


def _dots(results: Results, outliers: str) -> Iterator[Dot]:
    for row in select(results, outliers=outliers, attention=False, fp8_config="E4M3"):
        yield Dot(row["method"], TARGETS[row["target"]], row["divergence"], row["scheme"] == "static")


def write(results: Results) -> None:
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8"), results), encoding="utf-8")
    PICTURE.write_text(picture(results), encoding="utf-8")
