"""purpose="quantize": a training that ends with the model, and with the same model in FP8."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

from torch import nn

from ..calibration import calibrate
from ..calibration.facts import facts_of
from ..calibration.source import check_dataset
from ..config import FP8Config
from ..errors import FP8ConfigError, FP8NotAvailableError
from ..lifecycle import FP8State, dequantize, needs_ranges, start_measuring, state_of
from .event import Event
from .outcome import Outcome, converted
from .purpose import check_choice, check_count, refuse_kinds_of_training
from .recorder import EVALUATION, TRAINING, Recorder, Recording
from .sharded import made_again

logger = logging.getLogger(__name__)


class Quantizing(Recording):
    """Converts the model when training has ended, evaluates it in FP8 and saves it beside the trained one.

    Static activations are scaled by the config's `dataset`, which is run through the trained model; without one, by
    what went through it in training or evaluation. The model of the Trainer stays in high precision.
    """

    name = "quantize"

    def __init__(
        self,
        config: FP8Config | None,
        during: str = TRAINING,
        every: int = 1,
        save_to: str | os.PathLike[str] | None = None,
        evaluate: bool = True,
    ):
        super().__init__(config)
        during = check_choice("during", during, (TRAINING, EVALUATION))
        self.recorder = Recorder(self.asked, during, check_count("every", every), f"optimum_fp8.{self.name}")
        self.outcome = Outcome(save_to, evaluate)
        self._batches: Iterator[Any] | None = None  # of the config's dataset

    def train_begins(self, event: Event) -> None:
        refuse_kinds_of_training(event, self.name)
        if self.asked.fake_quant:
            raise FP8ConfigError(
                "FP8Callback: fake_quant=True with purpose='quantize': use purpose='qat', or leave fake_quant out"
            )
        self.outcome.check(event)
        if self.asked.mode == "MEASURE":
            raise FP8NotAvailableError(
                "FP8Callback: mode='MEASURE' only measures: use purpose='measure', or leave mode out"
            )
        if self.asked.dataset is not None:
            self._check_selection(event)
            source = check_dataset(self.asked.dataset)
            self._batches = source.opened(self.asked.dataset, self.asked, facts_of(event.model))
        elif not needs_ranges(self.recorder.start(event)):
            self.recorder.stop()
        self._first = event.state.global_step + 1

    def evaluated(self, event: Event) -> None:
        if event.trains and self.recorder.measures:
            self.recorder.record(event)

    def saved(self, event: Event) -> None:
        self.recorder.saved(event)

    def train_ended(self, event: Event) -> None:
        try:
            self.recorder.training_is_over()
            self.outcome.keep(event)
            if self.recorder.measures:
                self.results["measurements"] = self.recorder.finish(event)
            folder = self.outcome.in_fp8(event, self._made(event))
        finally:
            self.recorder.stop()
            if state_of(event.model) is not None:
                dequantize(event.model)
        self.results |= {"metrics": self.outcome.metrics, "saved_to": folder, "summary": self.outcome.summary(folder)}
        logger.info("FP8Callback: %s", self.results["summary"])

    def _made(self, event: Event) -> AbstractContextManager[nn.Module]:
        """The trained model in FP8, for as long as it is looked at."""
        if not event.is_sharded:
            return converted(event.model, self._state(event))
        config = self.asked if self.recorder.model is None else self.asked.replace(mode="QUANTIZE")
        self.recorder.stop()
        return made_again(event, config)

    def _state(self, event: Event) -> FP8State:
        """The state of the trained model, with all that its conversion needs."""
        state = state_of(event.model)
        if state is None:
            state = start_measuring(event.model, self.asked)
            if self.asked.dataset is not None and needs_ranges(state):
                calibrate(event.model, batches=self._batches)
        return state

    def _check_selection(self, event: Event) -> None:
        """Refuse a config that selects nothing, or that does not fit the model."""
        start_measuring(event.model, self.asked)
        dequantize(event.model)
