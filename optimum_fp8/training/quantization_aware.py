"""purpose="qat": quantization-aware training, which ends with the model in FP8."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

from torch import nn

from ..config import FP8Config
from ..errors import FP8StateError
from ..lifecycle import Phase, is_sharded, prepare, return_to_training, state_of, trained_state
from ..quantize import convert
from .event import Event
from .outcome import Outcome, converted, refuse_adapters
from .purpose import Purpose, refuse_kinds_of_training
from .sharded import made_again

logger = logging.getLogger(__name__)


class QuantizationAware(Purpose):
    """Trains with weights and inputs that are rounded to FP8, as `prepare` with `fake_quant=True` has it.

    What the modules remember is part of the model, so checkpoints hold it, and training that is resumed goes on from
    it. When training ends, the model is saved, converted, evaluated in FP8 and saved so; the model of the Trainer can
    be trained on.
    """

    name = "qat"

    def __init__(self, config: FP8Config | None, save_to: str | os.PathLike[str] | None = None, evaluate: bool = True):
        super().__init__(config)
        if not self.asked.fake_quant:
            self.config = self.asked.replace(fake_quant=True)
        self.outcome = Outcome(save_to, evaluate)

    def made(self, event: Event) -> None:
        refuse_adapters(event.model)
        if not _trains_so(event.model):
            prepare(event.model, self.asked)

    def train_begins(self, event: Event) -> None:
        refuse_kinds_of_training(event, self.name)
        if not _trains_so(event.model):
            if event.state.global_step or is_sharded(event.model):
                raise FP8StateError(
                    "FP8Callback: purpose='qat': the model was loaded from a checkpoint, or spread over processes, "
                    "before it was prepared: pass the callback when the Trainer is made, Trainer(…, callbacks=[…])"
                )
            prepare(event.model, self.asked)
        self.outcome.check(event)

    def train_ended(self, event: Event) -> None:
        self.outcome.keep(event)
        folder = self.outcome.in_fp8(event, self._made(event))
        self.results |= {
            "metrics": self.outcome.metrics,
            "saved_to": folder,
            "summary": self.outcome.summary(folder, "in training"),
        }
        logger.info("FP8Callback: %s", self.results["summary"])

    def _made(self, event: Event) -> AbstractContextManager[nn.Module]:
        return _from_files(event, self.asked) if event.is_sharded else _out_of_training(event.model)


def _trains_so(model: nn.Module) -> bool:
    """Whether a model is in quantization-aware training."""
    state = state_of(model)
    return state is not None and state.phase is Phase.TRAINING


@contextmanager
def _out_of_training(model: nn.Module) -> Iterator[nn.Module]:
    """Have a model be in FP8 inside; afterwards its training can go on."""
    state = state_of(model)
    assert state is not None
    with trained_state(model, state) as trained:
        try:
            with converted(model, trained):
                yield model
        finally:
            return_to_training(model, state)


@contextmanager
def _from_files(event: Event, config: FP8Config) -> Iterator[nn.Module]:
    with made_again(event, config) as model:
        yield convert(model)
