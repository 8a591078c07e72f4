"""Calibration data from a CSV or TSV file with a line of column names."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator

from ...config import FP8Config
from ...errors import FP8CalibrationError
from ..rows.columns import Row
from ..source import TableSource, opened, register_source, suffix_of


@register_source
class Delimited(TableSource):
    """The rows of a table as text."""

    expected = "the path of a table (.csv, .tsv)"
    suffixes = (".csv", ".tsv")
    compressed = True

    def rows_in(self, path: str, config: FP8Config) -> Iterator[Row]:
        with io.TextIOWrapper(opened(path), encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, delimiter="\t" if suffix_of(path) == ".tsv" else ",")
            try:
                for values in reader:
                    where = f"{path}, line {reader.line_num}"
                    if None in values:
                        raise FP8CalibrationError(
                            f"{where} has more values than the {len(reader.fieldnames or ())} columns: quote those "
                            "with a delimiter in them"
                        )
                    yield Row(where, values)
            except csv.Error as error:
                raise FP8CalibrationError(
                    f"{path}, line {reader.line_num + 1} cannot be read ({error}): write the data as JSON lines"
                ) from None
