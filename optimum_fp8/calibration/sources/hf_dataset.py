"""Calibration data from a `datasets.Dataset`: text, images, or model inputs, as its columns say."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ...config import FP8Config
from ...errors import FP8CalibrationError
from ..facts import ModelFacts
from ..rows import batches_of_rows
from ..source import Source, register_source


@register_source
class HFDataset(Source):
    """One split of the library `datasets`, in memory or streamed.

    Rows that hold model inputs already are collated, else text is tokenized and images go through the processor.
    """

    expected = "one split of a datasets.Dataset"

    def accepts(self, dataset: Any) -> bool:
        return type(dataset).__module__.split(".")[0] == "datasets"

    def check(self, dataset: Any) -> None:
        if isinstance(dataset, Mapping):
            raise FP8CalibrationError(f"the dataset is a dict of splits: pass one split of {sorted(dataset)}")

    def batches(self, dataset: Any, config: FP8Config, model: ModelFacts) -> Iterator[Any]:
        features = getattr(dataset, "features", None) or {}  # unknown for some streams
        images = [name for name, feature in features.items() if type(feature).__name__ == "Image"]
        return batches_of_rows(dataset, config, model, images)
