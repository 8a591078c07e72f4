"""Purpose: what an FP8Callback is for, as what it does at each event of a Trainer."""

from __future__ import annotations

import inspect
from typing import Any, ClassVar

from ..config import FP8Config
from ..errors import FP8ConfigError, FP8NotAvailableError, nearest
from .event import Event


class Purpose:
    """What a callback does. Events that a purpose does not need are inherited: nothing happens.

    Attributes:
        name: what `FP8Callback(…, purpose=…)` calls it.
        config: what is quantized, and how.
        results: what it has found so far, by the name of the callback's attribute.
    """

    name: ClassVar[str]
    needs_config: ClassVar[bool] = True

    def __init__(self, config: FP8Config | None):
        if config is None and self.needs_config:
            raise FP8ConfigError(
                f"FP8Callback: purpose={self.name!r} needs a config, found none: pass FP8Config(…) first"
            )
        if config is not None and not isinstance(config, FP8Config):
            raise FP8ConfigError(f"FP8Callback: expected an FP8Config, found {config!r}: use FP8Config(…)")
        if config is not None and config.mode in ("QUANTIZE", "LOAD"):
            raise FP8ConfigError(
                f"FP8Callback: mode={config.mode!r} is about a model that is loaded, with ranges or codes that are "
                "there already, and training changes its weights: leave mode out"
            )
        self.config = config
        self.results: dict[str, Any] = {}

    @classmethod
    def options(cls) -> list[str]:
        """The names of its options, in `FP8Callback(config, purpose=…, …)`."""
        return [name for name in inspect.signature(cls).parameters if name != "config"]

    @property
    def asked(self) -> FP8Config:
        """The configuration, where there has to be one."""
        assert self.config is not None
        return self.config

    def made(self, event: Event) -> None:
        """A Trainer was made with the callback."""

    def train_begins(self, event: Event) -> None:
        """Everything is ready for the first step: what would go wrong at the end is refused here."""

    def step_begins(self, event: Event) -> None:
        """A step of the optimizer begins: as many forward passes as gradients are accumulated of."""

    def step_ended(self, event: Event) -> None:
        """The optimizer has made its step; evaluating and saving come next."""

    def epoch_ended(self, event: Event) -> None:
        """All of the data went through once; evaluating and saving come next."""

    def prediction_step(self, event: Event) -> None:
        """A batch was evaluated."""

    def evaluated(self, event: Event) -> None:
        """An evaluation or prediction has ended."""

    def saved(self, event: Event) -> None:
        """A checkpoint was written."""

    def train_ended(self, event: Event) -> None:
        """Training is over, and the best model is loaded where that was asked for."""


def refuse_kinds_of_training(event: Event, purpose: str) -> None:
    """Refuse what spreads or copies a model in ways that measuring does not know.

    Raises:
        FP8NotAvailableError: DeepSpeed, or threads that each run a copy.
    """
    if event.trainer.is_deepspeed_enabled:
        raise FP8NotAvailableError(
            f"FP8Callback: purpose={purpose!r} with DeepSpeed: expected one process, DDP, or FSDP2 (fsdp_version: 2 "
            "for accelerate)"
        )
    if event.args.n_gpu > 1:
        raise FP8NotAvailableError(
            f"FP8Callback: purpose={purpose!r} with {event.args.n_gpu} devices in one process (DataParallel): start a "
            "process for each, with torchrun or accelerate launch, or choose one device with CUDA_VISIBLE_DEVICES"
        )


def check_count(name: str, value: Any) -> int:
    """A number of steps that an option gives.

    Raises:
        FP8ConfigError: it is none.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise FP8ConfigError(f"FP8Callback: {name}={value!r} is not valid: expected a whole number of steps, 1 or more")
    return value


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> str:
    """A word that an option gives.

    Raises:
        FP8ConfigError: it is none of the choices; the message says which is nearest.
    """
    if value not in choices:
        raise FP8ConfigError(f"FP8Callback: {name}={value!r} is not known: {nearest(str(value), choices)}")
    return str(value)
