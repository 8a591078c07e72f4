"""Calibration data that are batches already: a DataLoader or any other iterable."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

from ...config import FP8Config
from ..batching import batch_size_of
from ..facts import ModelFacts
from ..source import Source, register_source


@register_source
class Batches(Source):
    """An iterable of batches, which are passed on as they are; no more of a stream is read than needed."""

    expected = "a DataLoader or another iterable of batches"
    catch_all = True

    def accepts(self, dataset: Any) -> bool:
        return isinstance(dataset, Iterable) and not isinstance(dataset, (str, bytes, Mapping, torch.Tensor))

    def batches(self, dataset: Iterable[Any], config: FP8Config, model: ModelFacts) -> Iterator[Any]:
        seen = 0
        for batch in dataset:
            if seen >= config.num_calibration_samples:
                return
            seen += batch_size_of(batch)
            yield batch
