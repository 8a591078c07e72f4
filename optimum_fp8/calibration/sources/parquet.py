"""Calibration data from a Parquet file, read by the library `datasets`."""

from __future__ import annotations

from typing import Any

from ...config import FP8Config
from ..facts import ModelFacts
from ..rows.batches import Rows
from ..rows.columns import Row
from ..source import TableSource, name_of, register_source
from .hf_dataset import read, rows_of_split


@register_source
class Parquet(TableSource):
    """The rows of a Parquet file; no more of it is read than needed."""

    expected = "the path of a Parquet file (.parquet)"
    suffixes = (".parquet",)

    def rows_in(self, path: str, config: FP8Config) -> Any:
        return (Row(f"{path}, {row.where}", row.values) for row in self.rows(path, config, ModelFacts()).make())

    def rows(self, dataset: str, config: FP8Config, model: ModelFacts) -> Rows:
        split = read(dataset, "parquet", data_files={"train": dataset}, split="train")
        return rows_of_split(split, config, name_of(dataset))
