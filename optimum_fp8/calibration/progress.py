"""How far calibration is: a progress bar, now and then a line in the log, and the same as JSON lines in a file."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

import psutil
import torch
from tqdm.auto import tqdm

from ..config import FP8Config
from ..errors import FP8ConfigError

logger = logging.getLogger(__name__)

_LINE_EACH_SECONDS, _LINE_EACH_SHARE = 30.0, 0.1


class Progress:
    """What a calibration tells of itself while it runs; use it as a context.

    Args:
        config: how many samples there are at most, and the `calibration_log`.
        shown: whether this process is the one that tells.
        device: where the model is.
        clock: seconds that only grow.

    Attributes:
        of: how many samples there are at most.
        batches, samples, tokens: what went through, in all.
    """

    def __init__(
        self,
        config: FP8Config,
        *,
        shown: bool = True,
        device: torch.device | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.of: int = config.most_samples
        self.batches = self.samples = self.tokens = 0
        self._log, self._shown, self._device, self._clock = config.calibration_log, shown, device, clock
        self._process = psutil.Process()
        self._began = self._line_at = clock()
        self._line_of = self._earlier_samples = self._earlier_tokens = 0
        self._bar: Any = None

    def __enter__(self) -> Progress:
        self._write("start")
        self._bar = tqdm(total=self.of, desc="Calibrating", unit="sample", disable=not self._shown)
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()

    def resumed(self, batches: int, samples: int, tokens: int) -> None:
        """So much had been done before."""
        self.batches, self.samples, self.tokens = batches, samples, tokens
        self._earlier_samples, self._earlier_tokens, self._line_of = samples, tokens, samples
        self._began = self._line_at = self._clock()
        self._bar.update(samples - self._bar.n)
        self._bar.unpause()
        self._write("resumed")

    def advanced(self, batches: int, samples: int, tokens: int) -> None:
        """More went through the model."""
        self.batches, self.samples, self.tokens = self.batches + batches, self.samples + samples, self.tokens + tokens
        if not self._shown:
            return
        self._bar.set_postfix_str(self._speed_and_memory(), refresh=False)
        self._bar.update(samples)
        now = self._clock()
        if now - self._line_at >= _LINE_EACH_SECONDS or self.samples - self._line_of >= _LINE_EACH_SHARE * self.of:
            self._line_at, self._line_of = now, self.samples
            self._write("progress")
            logger.info("%s", self)

    def block(self, number: int, of: int, name: str, took: float | None = None) -> None:
        """One block of the model is done, where samples go through one after the other, in so many seconds."""
        self._write("block", block=number, blocks=of, name=name, **({} if took is None else {"block_seconds": took}))
        if self._shown:
            seconds = "" if took is None else f" in {took:.1f} s"
            logger.info("calibrated block %d of %d (%s)%s, %s", number, of, name, seconds, self._speed_and_memory())

    def saved(self, path: str) -> None:
        """What was measured so far is in a file."""
        self._write("saved", path=path)

    def finished(self) -> None:
        """All of the data went through, or as much as was needed."""
        self.of = self._bar.total = self.samples
        self._bar.refresh()
        self._write("finished")
        if self._shown:
            logger.info("%s", self)

    def judged(self, movement: str | None, shortcomings: list[str]) -> None:
        """What is to be said of the data that went through: how much ranges still moved, and what was not enough."""
        self._write("judged", movement=movement, warnings=shortcomings)

    @property
    def seconds(self) -> float:
        """Since it began, or went on."""
        return self._clock() - self._began

    @property
    def tokens_per_second(self) -> float:
        """Tokens, since it began or went on; 0 for data without."""
        return (self.tokens - self._earlier_tokens) / max(self.seconds, 1e-9)

    @property
    def seconds_left(self) -> float | None:
        """Until all samples are through, as fast as they were so far; None before the first."""
        done = self.samples - self._earlier_samples
        return (self.of - self.samples) * self.seconds / done if done else None

    def __str__(self) -> str:
        left = "" if self.seconds_left is None else f", {tqdm.format_interval(self.seconds_left)} left"
        share = self.samples / max(self.of, 1)
        return f"calibrated {self.samples} of {self.of} samples ({share:.0%}){left}, {self._speed_and_memory()}"

    def _speed_and_memory(self) -> str:
        parts = [f"{self.tokens_per_second:.0f} tokens/s"] if self.tokens else []
        parts += [f"{value / 1e9:.2f} GB {where}" for where, value in self._memory().items()]
        return ", ".join(parts)

    def _memory(self) -> dict[str, int]:
        """Bytes by where they are: of this process, and what tensors take on the model's device."""
        memory = {"RAM": int(self._process.memory_info().rss)}
        if self._device is not None and self._device.type not in ("cpu", "meta"):
            with suppress(AttributeError, RuntimeError):  # a device that does not tell
                memory[self._device.type] = int(torch.get_device_module(self._device).memory_allocated(self._device))
        return memory

    def _write(self, event: str, **more: Any) -> None:
        if self._log is None or not self._shown:
            return
        memory = self._memory()
        left = self.seconds_left
        line = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "event": event,
            "samples": self.samples,
            "of": self.of,
            "batches": self.batches,
            "tokens": self.tokens,
            "tokens_per_second": round(self.tokens_per_second, 1),
            "seconds": round(self.seconds, 3),
            "eta_seconds": None if left is None else round(left, 1),
            "rss_bytes": memory.pop("RAM"),
            "device_bytes": next(iter(memory.values()), None),
            **more,
        }
        try:
            with open(self._log, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            message = f"calibration_log={self._log!r} cannot be written ({error.strerror or error})"
            if event == "start":
                raise FP8ConfigError(f"{message}: expected the path of a file in a folder that is there") from None
            logger.warning("%s: calibration goes on without it", message)
            self._log = None
