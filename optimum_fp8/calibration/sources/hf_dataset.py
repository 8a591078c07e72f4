"""Calibration data from a `datasets.Dataset`: text, images, or model inputs, as its columns say."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import chain, islice
from typing import Any

import torch

from ...config import FP8Config
from ...errors import FP8CalibrationError
from ..batching import companion, groups, tokenized
from ..source import Source, register_source

_INPUTS = ("input_ids", "attention_mask", "token_type_ids", "pixel_values", "input_features", "input_values")


@register_source
class HFDataset(Source):
    """One split of the library `datasets`, in memory or streamed.

    Text is tokenized, images go through the processor, and rows that hold model inputs already are collated.
    """

    expected = "one split of a datasets.Dataset"

    def accepts(self, dataset: Any) -> bool:
        return type(dataset).__module__.split(".")[0] == "datasets"

    def check(self, dataset: Any) -> None:
        if isinstance(dataset, Mapping):
            raise FP8CalibrationError(f"the dataset is a dict of splits: pass one split of {sorted(dataset)}")

    def batches(self, dataset: Any, config: FP8Config, name_or_path: str) -> Iterator[Any]:
        rows = iter(dataset)
        first = next(rows, None)
        if not isinstance(first, Mapping):
            raise FP8CalibrationError("the dataset is empty: pass a split that has rows")
        rows = chain([first], rows)
        if config.text_column in first and isinstance(first[config.text_column], str | None):
            return tokenized((row[config.text_column] for row in rows), config, name_or_path)
        rows = islice(rows, config.num_calibration_samples)
        if "input_ids" in first or "pixel_values" in first:
            return _collated(rows, config.batch_size)
        image = next((key for key, value in first.items() if _is_image(value)), None)
        if image is not None:
            return _processed(rows, image, config, name_or_path)
        raise FP8CalibrationError(
            f"the dataset has columns {sorted(first)}: expected text in {config.text_column!r} (set text_column), "
            "images, or model inputs such as 'input_ids' or 'pixel_values'"
        )


def _is_image(value: Any) -> bool:
    """Whether it looks like an image of Pillow, which need not be installed."""
    return hasattr(value, "convert") and hasattr(value, "size")


def _processed(rows: Iterable[Any], column: str, config: FP8Config, name_or_path: str) -> Iterator[Any]:
    processor = companion("processor", config.processor, name_or_path)
    for group in groups(rows, config.batch_size):
        yield processor(images=[row[column] for row in group], return_tensors="pt")


def _collated(rows: Iterable[Any], size: int) -> Iterator[Any]:
    for group in groups(rows, size):
        keys = [key for key in _INPUTS if key in group[0]]
        try:
            yield {key: torch.stack([torch.as_tensor(row[key]) for row in group]) for key in keys}
        except RuntimeError:
            raise FP8CalibrationError(
                "rows of different lengths cannot be put into one batch: use batch_size=1, or a DataLoader that pads"
            ) from None
