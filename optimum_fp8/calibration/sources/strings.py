"""Calibration data from a list of strings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from ...config import FP8Config
from ..batching import tokenized
from ..facts import ModelFacts
from ..source import Source, register_source


@register_source
class Strings(Source):
    """A list or tuple of texts, one a sample."""

    expected = "a list of strings"

    def accepts(self, dataset: Any) -> bool:
        return isinstance(dataset, (list, tuple)) and bool(dataset) and all(isinstance(item, str) for item in dataset)

    def batches(self, dataset: Sequence[str], config: FP8Config, model: ModelFacts) -> Iterator[Any]:
        return tokenized(dataset, config, model)
