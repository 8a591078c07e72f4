"""Nothing is lost: what calibration has measured so far goes into a file, and a rerun of the same goes on from there.

The file holds the measurements of all processes together, and how many batches they are of: another number of
processes can go on with them. They are used where model, configuration and data are the same; the data are told by the
digests of those batches, which a rerun makes again, and does not run.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ..config import KEYS, FP8Config
from ..errors import FP8MeasurementError
from ..lifecycle.state import FP8State
from ..measure import Measurements
from ..measure.file_format import write_atomically
from ..measure.partial import kept_partial_path, partial_path
from ..measure.paths import file_digest

logger = logging.getLogger(__name__)

INTERVAL = 10.0  # seconds of calibrating between two files; shorter calibrations write none
_LITTLE = 0.05  # a share of the time that writing may take, where measurements are large


@dataclass
class Part:
    """How far a calibration is.

    Attributes:
        batches, samples, tokens: what went through.
        data: the sum of the batches' digests.
        checks: what each of the checks has to remember.
        stopped: whether a check has ended it.
    """

    batches: int = 0
    samples: int = 0
    tokens: int = 0
    data: str = ""
    checks: list[Any] = field(default_factory=list)
    stopped: bool = False


class PartialFile:
    """The file of one calibration, read once and written now and then.

    Args:
        model: the model that is measured.
        state: its state.
        config: of the data.
        checks: how many look at the measurements.

    Attributes:
        files: what is there that a rerun goes on from, in the end.
    """

    def __init__(self, model: nn.Module, state: FP8State, config: FP8Config, checks: int):
        self.path = partial_path(state.config.dump_stats_path, len(state.partials))
        self.files: list[str] = []
        self._model, self._key = state.measurements.without_data(), _key(model, state, config, checks)
        self._last, self._pause, self._usable = time.monotonic(), INTERVAL, True
        self._batches = 0  # that are in the file

    def read(self) -> tuple[Measurements, Part] | None:
        """What is there of the same calibration; None, and a warning, where it is of another."""
        for path in (self.path, kept_partial_path(self.path, self._model.fingerprint)):
            if not os.path.isfile(path):
                continue
            try:
                with open(path, "rb") as file:
                    measurements, notes = Measurements.decoded(file.read(), path)
                other = measurements.unlike(self._model)
                reason = f"of another model, {other}" if other else _why_other(notes, self._key)
                if reason is None:
                    self.files.append(path)
                    part = Part(**notes["part"])
                    self._batches = part.batches
                    return measurements, part
            except (FP8MeasurementError, OSError, TypeError) as error:
                reason = f"not readable: {error}"
            logger.warning("%s has measurements of a part of a calibration and is not used: it is %s", path, reason)
        return None

    def not_used(self, reason: str) -> None:
        """What was read turned out to be of other data."""
        logger.warning("%s has measurements of a part of a calibration and is not used: %s", self.path, reason)
        self.files.clear()
        self._batches = 0

    def is_due(self, batches: int, *, last: bool = False) -> bool:
        """Whether to write now, after so many batches; for the `last` time where there is a file that has fewer."""
        late = time.monotonic() - self._last >= self._pause
        return self._usable and batches > self._batches and (late or (last and bool(self.files)))

    def write(self, measurements: Measurements, part: Part) -> bool:
        """Write the measurements of all processes; False, and one warning, if nothing can be written."""
        began = time.monotonic()
        try:
            os.makedirs(os.path.dirname(self.path) or ".", exist_ok=True)
            data = measurements.encoded({"part": vars(part), "key": self._key})
            write_atomically(self.path, data, before=self._keep_other)
        except OSError as error:
            logger.warning(
                "%s cannot be written (%s): calibration goes on, and would begin anew if it is broken off",
                self.path,
                error.strerror or error,
            )
            self._usable = False
            return False
        if self.path not in self.files:
            self.files.append(self.path)
        self._batches, self._last = part.batches, time.monotonic()
        self._pause = max(INTERVAL, (self._last - began) / _LITTLE)
        return True

    def _keep_other(self) -> None:
        """Move a file of another model, or one that nobody can read, out of the way."""
        if self.path in self.files or not os.path.isfile(self.path):
            return
        try:
            with open(self.path, "rb") as file:
                found, _ = Measurements.decoded(file.read(), self.path)
            if found.unlike(self._model) is None:
                return
            told = found.fingerprint
        except FP8MeasurementError:
            told = file_digest(self.path)
        kept = kept_partial_path(self.path, told)
        os.replace(self.path, kept)
        logger.warning("%s was there and is of another model: it is now %s", self.path, kept)


def _why_other(notes: dict[str, Any], key: str) -> str | None:
    """Why what is in a file's header does not fit; None if it does."""
    if "part" not in notes:
        return "not the file of a calibration under way"
    return None if notes.get("key") == key else "of another configuration"


def _key(model: nn.Module, state: FP8State, config: FP8Config, checks: int) -> str:
    """What tells the configuration, as far as measurements depend on it, and how the model computes."""
    both = (state.config.to_dict(), config.to_dict())
    configs = [{name: keys[name] for name, key in KEYS.items() if not key.of_data} for keys in both]
    computes = sorted({f"{parameter.dtype} on {parameter.device.type}" for parameter in model.parameters()})
    attention = getattr(getattr(model, "config", None), "_attn_implementation", None)
    ends = config.num_calibration_samples == "auto"  # as a check may have decided
    told = json.dumps([configs, computes, attention, checks, ends], sort_keys=True, default=str)
    return hashlib.sha256(told.encode()).hexdigest()[:32]
