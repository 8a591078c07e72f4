"""Calibration data from a JSON file: one object or string a line, or a list of them."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from typing import Any

from ...config import FP8Config
from ...errors import FP8CalibrationError
from ..rows.columns import Row
from ..source import TableSource, opened, register_source, suffix_of


@register_source
class JsonLines(TableSource):
    """The lines of a JSON-lines file, or the items of a list in a .json file; empty lines are skipped."""

    expected = "the path of a JSON-lines file (.jsonl, .ndjson, .json)"
    suffixes = (".jsonl", ".ndjson", ".json")
    compressed = True

    def rows_in(self, path: str, config: FP8Config) -> Iterator[Row]:
        items = _items(path) if suffix_of(path) == ".json" and _is_list(path) else _lines(path)
        for where, item in items:
            yield _row(item, where, config)


def _lines(path: str) -> Iterator[tuple[str, Any]]:
    """What each line holds, and where that is."""
    with io.TextIOWrapper(opened(path), encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                where = f"{path}, line {number}"
                try:
                    yield where, json.loads(line)
                except json.JSONDecodeError as error:
                    raise FP8CalibrationError(
                        f"{where} is not JSON: {error}; expected one object a line, or a list in a .json file"
                    ) from None


def _is_list(path: str) -> bool:
    """Whether the file begins as a list does, and not as lists of which each is a line."""
    with io.TextIOWrapper(opened(path), encoding="utf-8-sig") as file:
        first = next((line for line in file if line.strip()), "").strip()
        if not first.startswith("["):
            return False
        try:
            json.loads(first)
        except json.JSONDecodeError:
            return True
        return not any(line.strip() for line in file)


def _items(path: str) -> Iterator[tuple[str, Any]]:
    with io.TextIOWrapper(opened(path), encoding="utf-8-sig") as file:
        try:
            items = json.load(file)
        except json.JSONDecodeError as error:
            raise FP8CalibrationError(f"dataset={path!r} is not JSON: {error}; expected a list of objects") from None
    for number, item in enumerate(items):
        yield f"{path}, item {number}", item


def _row(item: Any, where: str, config: FP8Config) -> Row:
    if isinstance(item, str):
        return Row(where, {config.text_column: item})
    if not isinstance(item, dict):
        raise FP8CalibrationError(
            f"{where} is {item!r}: expected an object such as {{{config.text_column!r}: …}}, or a string"
        )
    return Row(where, item)
