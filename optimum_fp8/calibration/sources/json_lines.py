"""Calibration data from a JSON-lines file: the text column of each line."""

from __future__ import annotations

import json
from collections.abc import Iterator

from ...config import FP8Config
from ...errors import FP8CalibrationError
from ..source import FileSource, register_source


@register_source
class JsonLines(FileSource):
    """The text column of each line of a JSON-lines file; empty lines are skipped."""

    expected = "the path of a JSON-lines file (.jsonl, .ndjson, .json)"
    suffixes = (".jsonl", ".ndjson", ".json")

    def texts(self, path: str, config: FP8Config) -> Iterator[str]:
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield _text(line, f"{path}, line {number}", config.text_column)


def _text(line: str, where: str, column: str) -> str:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise FP8CalibrationError(f"{where} is not JSON: {error}") from None
    if not isinstance(row, dict) or not isinstance(row.get(column), str):
        raise FP8CalibrationError(
            f"{where} has no text under {column!r}: set text_column to one of "
            f"{sorted(row) if isinstance(row, dict) else 'an object with columns'}"
        )
    return row[column]
