"""Event: what happens in a Trainer, and whose."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments

from ..errors import FP8StateError


@dataclass(frozen=True)
class Event:
    """One call of a callback.

    Attributes:
        trainer: who calls.
        model: what is trained or evaluated, without wrappers.
        args: the arguments of the training.
        state: how far it is.
        control: what the Trainer does next.
    """

    trainer: Trainer
    model: nn.Module
    args: TrainingArguments
    state: TrainerState
    control: TrainerControl

    @property
    def trains(self) -> bool:
        """Whether it comes out of `Trainer.train`."""
        return bool(getattr(self.trainer, "is_in_train", False))

    @property
    def remembered(self) -> dict[str, Any]:
        """What is saved with each checkpoint, JSON by the name of whose it is, and found when training is resumed."""
        remembered: Any = self.state.stateful_callbacks  # a dictionary, once the state is made
        return remembered  # type: ignore[no-any-return]

    @property
    def is_sharded(self) -> bool:
        """Whether FSDP has spread the weights over processes."""
        return bool(self.trainer.is_fsdp_enabled)


def calling_trainer() -> Trainer:
    """The Trainer that has called a callback.

    It tells its callbacks everything but who it is, and only it evaluates, saves and logs in the way that its user has
    set up. It is always among the callers: it calls its callbacks itself, and waits for them.

    Raises:
        FP8StateError: no Trainer has called.
    """
    frame: Any = sys._getframe(1)
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, Trainer):
            return caller
        frame = frame.f_back
    raise FP8StateError(
        "FP8Callback: an event was called by something other than a transformers.Trainer: expected one of its "
        "callbacks, as in Trainer(…, callbacks=[FP8Callback(config)]); by hand, use prepare and convert"
    )
