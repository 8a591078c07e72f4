"""Calibration data from a list of rows: dicts, conversations, or images or sounds by themselves."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from ...config import FP8Config
from ...errors import FP8CalibrationError
from ..facts import ModelFacts
from ..order import positions
from ..rows.batches import Rows
from ..rows.columns import Row, as_values, is_sample
from ..source import RowSource, register_source


@register_source
class RowList(RowSource):
    """A list or tuple of samples that are no batches: they hold text, messages, an image or audio, and no tensor."""

    expected = "a list of images, of conversations, or of dicts with text, messages, an image or audio"

    def accepts(self, dataset: Any) -> bool:
        if not isinstance(dataset, (list, tuple)) or not dataset or isinstance(dataset[0], (str, os.PathLike)):
            return False
        return is_sample(dataset[0])

    def rows(self, dataset: Sequence[Any], config: FP8Config, model: ModelFacts) -> Rows:
        order = positions(len(dataset), config)
        return Rows(lambda: as_rows(((number, dataset[number]) for number in order), config))


def as_rows(samples: Iterable[tuple[int, Any]], config: FP8Config) -> Iterator[Row]:
    """Numbered samples as rows: dicts as they are, others, such as images, under the name of what the first one is.

    Raises:
        FP8CalibrationError: one is no dict, and the first is.
    """
    column: str | None = None
    for index, (number, sample) in enumerate(samples):
        values = as_values(sample, config)
        if not index and values is not None and values is not sample:
            column = next(iter(values))
        if column is not None:
            values = {column: sample}
        elif values is None or values is not sample:
            raise FP8CalibrationError(
                f"sample {number} is of type {type(sample).__name__}: expected a dict, as sample 0"
            )
        yield Row(f"sample {number}", values)
