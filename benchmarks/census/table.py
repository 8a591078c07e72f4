"""The table of a census, made of its rows."""

from __future__ import annotations

import datetime
import json
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from .pairs import Pair

Row = dict[str, Any]

STATUSES = ("pass", "fail", "nothing", "not built", "not run")
_KEPT = ("model_type", "class_name", "autos", "status", "stage", "cause", "dtype", "inputs", "parameters", "share")
_FIGURES = ("error", "error_of_fake", "error_with_attention", "error_of_dequantized", "generates")


def compact(row: Row) -> Row:
    """What is kept of a row: figures of three digits, causes of 300 characters, nothing that is empty."""
    kept = {key: row[key] for key in (*_KEPT, *_FIGURES) if row.get(key)}
    kept |= {key: float(f"{row[key]:.3g}") for key in _FIGURES if isinstance(row.get(key), float) and row[key]}
    return kept | ({"cause": row["cause"][:300]} if row.get("cause") else {})


def write_rows(rows: Collection[Row], path: Path) -> None:
    """Write rows as JSON lines, sorted by architecture and class."""
    ordered = sorted(rows, key=lambda row: (row["model_type"], row["class_name"]))
    path.write_text("".join(f"{json.dumps(compact(row))}\n" for row in ordered))


def sentence(rows: Collection[Row], known: Sequence[Pair]) -> str:
    """The result in a sentence."""
    found = Counter(row["status"] for row in rows)
    judged = found["pass"] + found["fail"]
    share = 100 * found["pass"] / judged if judged else 0.0
    architectures = len({row["model_type"] for row in rows if row["status"] in ("pass", "fail")})
    return (
        f"Of the {len(known):,} model classes that transformers' auto classes lead to, {len(rows)} were tried and "
        f"{judged} judged, of {architectures} architectures: {found['pass']} passed ({share:.1f} %)."
    )


def markdown(rows: Collection[Row], known: Sequence[Pair]) -> str:
    """The page: a summary by auto class, what failed and why, and a line for each row."""
    ordered = sorted(rows, key=lambda row: (row["model_type"], row["class_name"]))
    versions = (
        f"transformers {transformers.__version__}, torch {torch.__version__}, {datetime.date.today().isoformat()}"
    )
    lines = ["# The census of architectures", "", f"Made by `python -m benchmarks.census` with {versions}.", ""]
    lines += [sentence(rows, known), "", *_by_auto_class(ordered, known)]
    for status, title in (("fail", "What fails"), ("nothing", "Nothing to quantize"), ("not run", "Not run")):
        lines += ["", f"## {title}", "", *(_cause(row) for row in ordered if row["status"] == status)]
    lines += ["", "## Not built", "", "No tiny model that runs was found; the last thing that transformers said:", ""]
    lines += [_cause(row) for row in ordered if row["status"] == "not built"]
    return "\n".join([*lines, "", "## What passes", "", *_passing(ordered), ""])


def _by_auto_class(rows: Sequence[Row], known: Sequence[Pair]) -> list[str]:
    total = Counter(auto for pair in known for auto in pair.autos)
    counts = Counter((auto, row["status"]) for row in rows for auto in row["autos"])
    lines = [f"| auto class | classes | {' | '.join(STATUSES)} |", f"|---|{'---|' * (len(STATUSES) + 1)}"]
    for auto, number in total.most_common():
        found = [counts[auto, status] for status in STATUSES]
        if any(found):
            lines.append(f"| {auto} | {number} | {' | '.join(map(str, found))} |")
    return lines


def _cause(row: Row) -> str:
    stage = f" ({row['stage']})" if row.get("stage") and row["status"] == "fail" else ""
    return f"- {row['model_type']}, {row['class_name']}{stage}: {row.get('cause', '')[:300].replace('|', ';')}"


def _passing(rows: Sequence[Row]) -> list[str]:
    lines = [
        "| architecture | class | inputs | share | error | independent | with attention |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if row["status"] == "pass":
            errors = " | ".join(
                f"{row.get(key, 0.0):.3f}" for key in ("error", "error_of_fake", "error_with_attention")
            )
            inputs = ", ".join(name for name in row["inputs"] if "mask" not in name and "type_ids" not in name)
            lines.append(f"| {row['model_type']} | {row['class_name']} | {inputs} | {row['share']:.0%} | {errors} |")
    return lines
