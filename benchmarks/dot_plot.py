"""A dot plot as SVG: panels side by side with common rows, a logarithmic axis, a color for each series."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from html import escape
from typing import NamedTuple

COLORS = ("#0072b2", "#d55e00", "#555555")  # told apart by color-blind readers too
LABELS, PANEL, GAP, ROW, TOP, BOTTOM = 330, 210, 24, 22, 62, 34
RADIUS = 4.5


class Dot(NamedTuple):
    """A value of a series in a row; hollow ones are drawn as rings."""

    row: str
    series: str
    value: float
    filled: bool


class Panel(NamedTuple):
    title: str
    dots: Sequence[Dot]


def drawn(panels: Sequence[Panel], caption: str, series: Sequence[str]) -> str:
    """The picture; rows are in the order in which the first dots name them."""
    rows = list(dict.fromkeys(dot.row for panel in panels for dot in panel.dots))
    values = [dot.value for panel in panels for dot in panel.dots if dot.value > 0]
    decades = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    width, height = LABELS + len(panels) * (PANEL + GAP), TOP + len(rows) * ROW + BOTTOM
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
        _text(8, 20, caption),
        *_legend(series, width),
        *(_text(LABELS - 12, _middle(place) + 4, row, anchor="end") for place, row in enumerate(rows)),
    ]
    for number, panel in enumerate(panels):
        lines += _panel(panel, LABELS + number * (PANEL + GAP), rows, series, decades)
    return "\n".join([*lines, "</svg>", ""])


def _middle(place: int) -> float:
    return TOP + (place + 0.5) * ROW


def _text(x: float, y: float, text: str, anchor: str = "start") -> str:
    return f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" fill="#222222">{escape(text)}</text>'


def _legend(series: Sequence[str], width: int) -> Iterator[str]:
    for number, name in enumerate(series):
        x = width - 110 * (len(series) - number)
        yield _circle(x, 16, COLORS[number], filled=True)
        yield _text(x + 10, 20, name)


def _circle(x: float, y: float, color: str, filled: bool) -> str:
    return (
        f'<circle cx="{x:.1f}" cy="{y:g}" r="{RADIUS}" stroke="{color}" stroke-width="1.5" '
        f'fill="{color if filled else "none"}"/>'
    )


def _panel(panel: Panel, left: int, rows: list[str], series: Sequence[str], decades: tuple[int, int]) -> Iterator[str]:
    first, last = decades
    bottom = TOP + len(rows) * ROW
    yield _text(left + PANEL / 2, TOP - 10, panel.title, anchor="middle")
    for place in range(len(rows)):
        y = _middle(place)
        yield f'<line x1="{left}" x2="{left + PANEL}" y1="{y:g}" y2="{y:g}" stroke="#eeeeee"/>'
    for decade in range(first, last + 1):
        x = left + PANEL * (decade - first) / (last - first)
        yield f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{bottom}" stroke="#cccccc"/>'
        yield _text(x, bottom + 18, f"{10.0**decade:g}", anchor="middle")
    for dot in panel.dots:
        number = series.index(dot.series)
        x = left + PANEL * (math.log10(max(dot.value, 10.0**first)) - first) / (last - first)
        y = _middle(rows.index(dot.row)) + 6 * (number - (len(series) - 1) / 2)
        yield _circle(x, y, COLORS[number], dot.filled)
