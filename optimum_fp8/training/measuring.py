"""purpose="measure": the ranges of activations, as they are while a model is trained or evaluated."""

from __future__ import annotations

import logging
from typing import Any

from torch import nn

from ..config import FP8Config
from ..errors import FP8ConfigError, FP8StateError
from ..lifecycle import needs_ranges
from ..measure import Measurements, check_dump_path
from .event import Event
from .passes import ForwardPasses
from .purpose import check_choice, check_count, refuse_kinds_of_training
from .recorder import EVALUATION, TRAINING, Recorder, Recording

logger = logging.getLogger(__name__)


class Measuring(Recording):
    """Measures, and writes `<dump_stats_path>_measurements.safetensors`; the model stays as it is.

    Where `train` is called, its batches are measured, or those of its evaluations, as `during` says. Where it is not,
    those of `evaluate` and `predict` are: each adds to what was seen of the same weights.
    """

    name = "measure"

    def __init__(self, config: FP8Config | None, during: str = TRAINING, every: int = 1):
        super().__init__(config)
        self.during = check_choice("during", during, (TRAINING, EVALUATION))
        self.recorder = Recorder(self.asked, self.during, check_count("every", every), f"optimum_fp8.{self.name}")
        self._waiting: ForwardPasses | None = None

    def made(self, event: Event) -> None:
        self._wait(event)

    def train_begins(self, event: Event) -> None:
        self._stop_waiting()
        refuse_kinds_of_training(event, self.name)
        check_dump_path(self.asked.dump_stats_path)
        self.recorder.during = self.during
        if not needs_ranges(self.recorder.start(event)):
            self.recorder.stop()
            raise FP8ConfigError(
                f"FP8Callback: purpose='measure' with activation_scheme={self.asked.activation_scheme!r} and "
                f"scale_method={self.asked.scale_method!r}: no scale would follow from a range: use "
                "activation_scheme='static'"
            )
        self._first = event.state.global_step + 1

    def prediction_step(self, event: Event) -> None:
        if not self.recorder.measures:
            raise FP8StateError(
                "FP8Callback: the callback came too late to measure this evaluation: pass it when the Trainer is made, "
                "Trainer(…, callbacks=[FP8Callback(config)])"
            )

    def evaluated(self, event: Event) -> None:
        if event.trains:
            if self.recorder.measures:
                self.recorder.record(event)
            return
        if self.recorder.measures:
            self._finish(event)
            self._wait(event)

    def saved(self, event: Event) -> None:
        self.recorder.saved(event)

    def train_ended(self, event: Event) -> None:
        self._finish(event)

    def _finish(self, event: Event) -> None:
        try:
            measured = self.recorder.finish(event)
        finally:
            self.recorder.stop()
        self.results["measurements"] = measured
        self.results["summary"] = f"{measured!r} in {self.asked.dump_stats_path}"
        logger.info("FP8Callback: %s", self.results["summary"])

    # --- evaluation without training ------------------------------------------------------------------------------

    def _wait(self, event: Event) -> None:
        """Begin to measure with the first batch that is evaluated: nothing tells a callback before it."""

        def begin(model: nn.Module, inputs: dict[str, Any]) -> Any:
            if event.trains or model.training or self.recorder.measures:
                return None
            self._start_evaluation(event)
            return self.recorder.first_pass(model, inputs)

        self._stop_waiting()
        self._waiting = ForwardPasses(event.model, begin)

    def _stop_waiting(self) -> None:
        if self._waiting is not None:
            self._waiting.remove()
            self._waiting = None

    def _start_evaluation(self, event: Event) -> None:
        refuse_kinds_of_training(event, self.name)
        check_dump_path(self.asked.dump_stats_path)
        self.recorder.during = EVALUATION
        self.recorder.start(event, trained=False)
        before: Measurements | None = self.results.get("measurements")
        if before is not None and before.fingerprint == self.recorder.state.measurements.fingerprint:
            self.recorder.add_earlier(before)
