"""Calibration data from a JSON-lines file: text or model inputs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from ...config import FP8Config
from ...errors import FP8CalibrationError
from ..batching import collated, say_left_out
from ..facts import ModelFacts
from ..source import FileSource, register_source

_MISSING = object()


@register_source
class JsonLines(FileSource):
    """The text column of each line of a JSON-lines file, or its model inputs; empty lines are skipped."""

    expected = "the path of a JSON-lines file (.jsonl, .ndjson, .json)"
    suffixes = (".jsonl", ".ndjson", ".json")

    def batches(self, dataset: str, config: FP8Config, model: ModelFacts) -> Iterator[Any]:
        _, first = next(self.decoded(dataset, _rows(dataset)), ("", None))
        if isinstance(first, dict) and model.main_input in first:
            return collated(self.decoded(dataset, _objects(dataset)), config, model)
        if isinstance(first, dict):
            say_left_out((key for key in first if key != config.text_column), "are not the text")
        return super().batches(dataset, config, model)

    def texts(self, path: str, config: FP8Config) -> Iterator[str]:
        for where, row in _rows(path):
            yield _text(row, where, config.text_column)


def _rows(path: str) -> Iterator[tuple[str, Any]]:
    """What each line holds, and where that is."""
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                where = f"{path}, line {number}"
                try:
                    yield where, json.loads(line)
                except json.JSONDecodeError as error:
                    raise FP8CalibrationError(f"{where} is not JSON: {error}; expected one object a line") from None


def _objects(path: str) -> Iterator[dict[str, Any]]:
    for where, row in _rows(path):
        if not isinstance(row, dict):
            raise FP8CalibrationError(f"{where} is {row!r}: expected an object with model inputs, as in the first line")
        yield row


def _text(row: Any, where: str, column: str) -> str:
    value = row.get(column, _MISSING) if isinstance(row, dict) else _MISSING
    if isinstance(value, str):
        return value
    if not isinstance(row, dict):
        found = f"it is a {type(row).__name__}, and one object a line is expected, such as {{{column!r}: …}}"
    elif value is None:
        found = "the value is null: correct or remove the line"
    elif value is not _MISSING:
        found = f"the value is {value!r}: expected a string"
    else:
        others = sorted(key for key, other in row.items() if isinstance(other, str))
        found = f"set text_column to one of {others}" if others else f"it has no text at all, only {sorted(row)}"
    raise FP8CalibrationError(f"{where} has no text under {column!r}: {found}")
