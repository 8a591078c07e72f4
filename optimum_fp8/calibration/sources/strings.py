"""Calibration data from a list of strings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ...config import FP8Config
from ..facts import ModelFacts
from ..order import positions
from ..rows.batches import Rows
from ..rows.columns import Row
from ..source import RowSource, register_source
from .paths import are_files


@register_source
class Strings(RowSource):
    """A list or tuple of texts, one a sample."""

    expected = "a list of strings"

    def accepts(self, dataset: Any) -> bool:
        if not isinstance(dataset, (list, tuple)) or not dataset or are_files(dataset):
            return False
        return all(isinstance(item, str) for item in dataset)

    def rows(self, dataset: Sequence[str], config: FP8Config, model: ModelFacts) -> Rows:
        order = positions(len(dataset), config)
        return Rows(lambda: (Row(f"sample {number}", {config.text_column: dataset[number]}) for number in order))
