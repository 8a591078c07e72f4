"""Calibration by a function that runs the model."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from ...config import FP8Config
from ...errors import FP8CalibrationError
from ..facts import ModelFacts
from ..source import Source, register_source


@register_source
class Function(Source):
    """A callable that is given the model and calls it as it likes."""

    expected = "a callable that is given the model"

    def accepts(self, dataset: Any) -> bool:
        return callable(dataset)

    def check(self, dataset: Any) -> None:
        try:
            inspect.signature(dataset).bind(None)
        except TypeError as error:
            raise FP8CalibrationError(
                f"dataset={getattr(dataset, '__name__', dataset)} cannot be called with the model alone ({error}): "
                "expected a function of one argument; of one that makes data, pass what it returns"
            ) from None
        except ValueError:  # of some built-in callables nothing is known
            return

    def batches(self, dataset: Any, config: FP8Config, model: ModelFacts) -> Iterator[Any]:
        raise FP8CalibrationError(
            f"dataset of type {type(dataset).__name__} calls the model by itself and has no batches: pass an iterable "
            "of batches where batches are needed"
        )

    def opened(self, dataset: Any, config: FP8Config, model: ModelFacts) -> None:
        self.refuse_keys(dataset, config)

    def run(
        self,
        dataset: Callable[[nn.Module], Any],
        model: nn.Module,
        config: FP8Config,
        forward: Callable[[Iterator[Any]], None],
    ) -> None:
        self.refuse_keys(dataset, config)
        dataset(model)
