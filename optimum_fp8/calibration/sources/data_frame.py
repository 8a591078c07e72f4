"""Calibration data from pandas, which need not be installed."""

from __future__ import annotations

from typing import Any

from ...config import FP8Config
from ..facts import ModelFacts
from ..order import positions
from ..rows.batches import Rows
from ..rows.columns import Row
from ..source import RowSource, register_source


@register_source
class DataFrame(RowSource):
    """The rows of a data frame, or the values of a series, which are texts."""

    expected = "a pandas DataFrame or Series"

    def accepts(self, dataset: Any) -> bool:
        is_pandas = type(dataset).__module__.split(".")[0] == "pandas"
        return is_pandas and type(dataset).__name__ in ("DataFrame", "Series")

    def rows(self, dataset: Any, config: FP8Config, model: ModelFacts) -> Rows:
        frame = dataset if hasattr(dataset, "columns") else dataset.to_frame(config.text_column)
        order = positions(len(frame), config)
        return Rows(lambda: (Row(f"row {frame.index[n]}", _values(frame, n)) for n in order))


def _values(frame: Any, number: int) -> dict[str, Any]:
    return {str(key): value for key, value in zip(frame.columns, frame.iloc[number].tolist(), strict=True)}
