"""Calibration data from a list of paths: of images, of audio, or of files of rows."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from ...config import FP8Config
from ...errors import FP8CalibrationError
from ..facts import ModelFacts
from ..order import drawn, positions
from ..rows.batches import Rows
from ..rows.columns import AUDIO_SUFFIXES, IMAGE_SUFFIXES, Row
from ..source import SOURCES, RowSource, TableSource, register_source, suffix_of

_COLUMNS = {"image": IMAGE_SUFFIXES, "audio": AUDIO_SUFFIXES}


@register_source
class Paths(RowSource):
    """A list or tuple of paths: each image or sound is a sample, and so is each row of a file of text or a table."""

    expected = "a list of paths of files"

    def accepts(self, dataset: Any) -> bool:
        return isinstance(dataset, (list, tuple)) and bool(dataset) and are_files(dataset)

    def rows(self, dataset: Sequence[Any], config: FP8Config, model: ModelFacts) -> Rows:
        return rows_of_files([os.fspath(path) for path in dataset], config, model)


def are_files(paths: Sequence[Any]) -> bool:
    """Whether they are paths: objects, or strings that all end as files of data do, of which one is there or that
    have no blank in them: a path that is misspelt must not be taken for a text."""
    if isinstance(paths[0], os.PathLike):
        return True
    if not all(isinstance(path, str) and has_suffix_of_data(path) for path in paths):
        return False
    return any(map(os.path.isfile, paths)) or all(len(path.split()) == 1 for path in paths)


def has_suffix_of_data(path: str) -> bool:
    """Whether a path ends as that of a file of rows, an image or audio does."""
    tables = (suffix for source in _tables() for suffix in source.suffixes)
    return suffix_of(path) in {*IMAGE_SUFFIXES, *AUDIO_SUFFIXES, *tables}


def rows_of_files(paths: Sequence[str], config: FP8Config, model: ModelFacts, name: str = "the dataset") -> Rows:
    """The samples in files of one kind.

    Raises:
        FP8CalibrationError: one is not there, or of another kind than the first.
    """
    for path in paths:
        if not os.path.isfile(path):
            raise FP8CalibrationError(f"{name} holds the path {path!r}, and there is no such file")
    for column, suffixes in _COLUMNS.items():
        if suffix_of(paths[0]) in suffixes:
            odd = [path for path in paths if suffix_of(path) not in suffixes]
            if odd:
                raise FP8CalibrationError(
                    f"{name} holds {odd[0]!r} beside {column} files such as {paths[0]!r}: drop it"
                )
            rows = [Row(paths[number], {column: paths[number]}) for number in positions(len(paths), config)]
            return Rows(partial(iter, rows), name=name)
    unordered = config.replace(shuffle_calibration_samples=False)
    parts = [_table(path, name).rows(path, unordered, model) for path in paths]

    def read() -> Iterator[Row]:
        for part in parts:
            yield from part.make()

    folder, again = parts[0].folder, all(part.again for part in parts)
    if config.shuffle_calibration_samples:
        kept = drawn(read(), config)
        return Rows(lambda: iter(kept), again, parts[0].images, parts[0].audio, folder, name)
    return Rows(read, again, parts[0].images, parts[0].audio, folder, name)


def _tables() -> list[TableSource]:
    return [source for source in SOURCES if isinstance(source, TableSource)]


def _table(path: str, name: str) -> TableSource:
    for source in _tables():
        if source.accepts(path):
            return source
    raise FP8CalibrationError(f"{name} holds the path {path!r}, which is of no kind that can be read")
