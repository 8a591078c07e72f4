"""Calibration data from a list of rows: dicts with text or images, or images by themselves."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ...config import FP8Config
from ...errors import FP8CalibrationError
from ..facts import ModelFacts
from ..rows import batches_of_rows, is_image
from ..source import Source, register_source


@register_source
class RowList(Source):
    """A list or tuple of samples that are no batches: they hold text or an image, and no tensor or array."""

    expected = "a list of images, or of dicts with text or an image"

    def accepts(self, dataset: Any) -> bool:
        return isinstance(dataset, (list, tuple)) and bool(dataset) and _is_row(dataset[0])

    def batches(self, dataset: Sequence[Any], config: FP8Config, model: ModelFacts) -> Iterator[Any]:
        rows = (_row(sample, number, dataset[0]) for number, sample in enumerate(dataset))
        return batches_of_rows(rows, config, model)


def _is_row(sample: Any) -> bool:
    if not isinstance(sample, Mapping):
        return is_image(sample)
    values = list(sample.values())
    has_arrays = any(hasattr(value, "shape") for value in values)
    return not has_arrays and any(isinstance(value, str) or is_image(value) for value in values)


def _row(sample: Any, number: int, first: Any) -> Mapping[str, Any]:
    if isinstance(first, Mapping):
        if isinstance(sample, Mapping):
            return sample
        raise FP8CalibrationError(f"sample {number} is of type {type(sample).__name__}: expected a dict, as sample 0")
    return {"image": sample}
