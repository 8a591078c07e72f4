"""`optimum-cli fp8 inspect`: a checkpoint in, what it is out."""

from __future__ import annotations

import json
from argparse import Namespace
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from ..commands.outcome import outcome
from ..report import format_bytes, format_share
from .inspection import inspect

_NAMED = 4


def main(args: Namespace) -> int:
    """Run the command; 0 when the summary is printed, 1 for an error that a message explains."""
    return outcome(_inspect, args)


def _inspect(args: Namespace) -> str:
    found = inspect(args.checkpoint)
    return json.dumps(found, indent=2, ensure_ascii=False) if args.json else summary(found)


def summary(found: Mapping[str, Any]) -> str:
    """What `inspect` found, as lines of a label and a text."""
    rows = list(_rows(found))
    width = max(len(label) for label, _ in rows)
    return "\n".join(f"{label.ljust(width)}  {text}" for label, text in rows)


def _rows(found: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    size = found["size"]
    yield "checkpoint", f"{found['folder']} ({', '.join(found['architectures']) or 'no architecture named'})"
    yield "format", found["format"] or "high precision"
    if made := found.get("made_with"):
        yield "made with", f"{', '.join(f'{name} {version}' for name, version in made.items())}, on {found['date']}"
    for place, scheme in found.get("schemes", {}).items():
        yield ("scheme" if place == "all modules" else f"  {place}"), scheme
    total = sum(size.values())
    yield (
        "size",
        f"{format_bytes(total)}: {format_share(size['fp8'], total)} in FP8, {format_bytes(size['scales'])} of scales, "
        f"{format_bytes(size['high_precision'])} in high precision",
    )
    for each in found["weights"]:
        yield "weights", f"{each['count']} in {each['dtype']}, scaled {each['scaled']}{_spread(each['scales'])}"
        if "input_scales" in each:
            yield "  inputs", f"static{_spread(each['input_scales'])}"
    for name, each in found["attention"].items():
        yield "other scales", f"{each['count']} {name}{_spread(each['spread'])}"
    if data := found.get("data"):
        yield "data", ", ".join(f"{name} {value}" for name, value in data.items())
    if skipped := found.get("skipped"):
        yield "in high precision", _skipped(skipped)
    for each in found.get("changes", ()):
        more = [f"{name} {each[name]}" for name in each if name not in ("what", "date", "made_with", "before")]
        yield "since then", f"{each['what']}: {', '.join(more)}, on {each['date']}"


def _spread(values: list[float]) -> str:
    return f" from {values[0]:.3g} to {values[2]:.3g} (median {values[1]:.3g})" if values else ""


def _skipped(skipped: Mapping[str, str]) -> str:
    """How many modules were skipped for each reason, the commonest first, with the name of one."""
    first = {why: name for name, why in reversed(list(skipped.items()))}
    counts = Counter(skipped.values()).most_common()
    named = [f"{first[why]}{f' and {count - 1} more' if count > 1 else ''} ({why})" for why, count in counts[:_NAMED]]
    return ", ".join(named) + (", …" if len(counts) > _NAMED else "")
