"""How much ranges still move as samples go through the model, and when that is little enough to stop.

Ranges are looked at now and then, when the measurements of all processes are one. What is found depends on nothing but
the data: however many processes share it, they stop at the same sample.
"""

from __future__ import annotations

import logging
import math
from typing import Any

import torch
from torch import nn

from ..errors import FP8StateError
from ..lifecycle import state_of, unwrapped
from ..measure import Measurements

logger = logging.getLogger(__name__)

FEWEST_SAMPLES = 32  # that "auto" takes
MUCH = 0.05  # part of itself by which a range has moved much
_FEW = 0.01  # part of the ranges that may still move much when "auto" stops
_MANY = 0.1  # part of the ranges that a warning is for
_SHOWN = 3


def range_movement(model: nn.Module) -> dict[str, float]:
    """By which part of itself each range still moved over the last quarter of the calibration samples.

    Args:
        model: one that `calibrate`, or `from_pretrained` with a `dataset`, has calibrated; it may be converted already.

    Returns:
        a number from 0 to 1 by `<module>/<kind>`, the largest first. Empty where it is not known: with few batches,
        after a calibration loop of one's own, or with measurements from a file.

    Raises:
        FP8StateError: nothing was done to the model.
    """
    state = state_of(unwrapped(model))
    if state is None:
        raise FP8StateError("range_movement: this model was not calibrated: call prepare(model, config) first")
    return dict(state.moved)


class Convergence:
    """Ranges at the latest checks, from which it follows how much they moved over the last quarter of the samples.

    Attributes:
        stops: whether `note` may end the calibration: `num_calibration_samples="auto"`.
        samples: how many there were at the latest check.
        since: how many there were at the check that it is compared with; None as long as there is none.
        enough: whether ranges no longer moved.
    """

    def __init__(self, stops: bool = False):
        self.stops, self.enough, self._calm = stops, False, False
        self._names: list[str] = []  # in the order in which they were first measured
        self._checks: list[tuple[int, list[float]]] = []

    def state(self) -> dict[str, Any]:
        """All that is known, as JSON has it."""
        return {"enough": self.enough, "calm": self._calm, "names": self._names, "checks": self._checks}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what `state` gave."""
        self.enough, self._calm, self._names = state["enough"], state["calm"], list(state["names"])
        self._checks = [(samples, list(ranges)) for samples, ranges in state["checks"]]

    def is_due(self, batches: int) -> bool:
        """Whether ranges are looked at after so many batches.

        These are 8, 16, 24, 32, and from there on multiples of 8 that grow by a third or a half from one to the next;
        where a look may end the calibration, by an eighth at most.
        """
        octave = 2 ** ((batches // 8).bit_length() - 1)
        return batches > 0 and batches % max(8, octave if self.stops else 4 * octave) == 0

    def note(self, measurements: Measurements, batches: int, samples: int) -> bool:
        """Look at the ranges; whether the calibration ends.

        It is enough with `FEWEST_SAMPLES` or more, when at two checks one after the other at most 1 % of the ranges
        have moved by more than 5 % over the last quarter of the samples.

        Args:
            measurements: of all processes, over this data alone.
            batches: how many batches of it have gone through the model.
            samples: how many samples.
        """
        if samples > self.samples:
            self._add(measurements, samples)
            calm = self.since is not None and self._share() <= _FEW
            self.enough = calm and self._calm and samples >= FEWEST_SAMPLES
            self._calm = calm
        return self.stops and self.enough

    @property
    def samples(self) -> int:
        return self._checks[-1][0] if self._checks else 0

    @property
    def since(self) -> int | None:
        first = self._checks[0][0] if self._checks else 0
        return first if 0 < 4 * first <= 3 * self.samples else None

    def movement(self) -> dict[str, float]:
        """By which part of itself each range, `<module>/<kind>`, has moved since `since`, the largest first; or {}."""
        if self.since is None:
            return {}
        (_, before), (_, now) = self._checks[0], self._checks[-1]
        before = before + [0.0] * (len(now) - len(before))
        moved = {name: _moved(*ranges) for name, *ranges in zip(self._names, before, now, strict=True)}
        return dict(sorted(moved.items(), key=lambda item: (-item[1], item[0])))

    def say(self) -> str | None:
        """Log how much ranges moved in a line, which is returned; a warning where many did. None: it is not known."""
        moved = self.movement()
        if not moved and not (self.stops and self.samples):
            return None
        if not moved:
            line = f'num_calibration_samples="auto": {self.samples} samples do not tell whether it is enough: use more'
            logger.warning("%s", line)
            return line
        much = sum(part > MUCH for part in moved.values())
        worst = ", ".join(f"{name} {part:.1%}" for name, part in list(moved.items())[:_SHOWN])
        line = (
            f"over the last {self.samples - (self.since or 0)} of {self.samples} samples, {much} of {len(moved)} "
            f"ranges moved by more than {MUCH:.0%} (most: {worst})"
        )
        if self.stops:
            enough = "enough" if self.enough else "not enough"
            line = f'num_calibration_samples="auto": {self.samples} samples are {enough}; {line}'
        short = self._share() > _MANY or (self.stops and not self.enough)
        line += ": use more samples, or an observer that cuts off outliers" if short else ""
        logger.log(logging.WARNING if short else logging.INFO, "%s", line)
        return line

    def _add(self, measurements: Measurements, samples: int) -> None:
        found = _ranges(measurements)
        self._names = list(dict.fromkeys([*self._names, *found]))
        self._checks.append((samples, [found.get(name, 0.0) for name in self._names]))
        while len(self._checks) > 2 and 4 * self._checks[1][0] <= 3 * samples:
            del self._checks[0]

    def _share(self) -> float:
        """Which part of the ranges has moved much."""
        moved = self.movement()
        return sum(part > MUCH for part in moved.values()) / max(len(moved), 1)


def _ranges(measurements: Measurements) -> dict[str, float]:
    """All ranges of activations, fetched from the device at once."""
    found = {
        f"{module}/{kind}": observer.range()
        for (module, kind), observer in sorted(measurements.tensors.items(), key=lambda item: item[0])
        if kind != "weight"
    }
    if not found:
        return {}
    device = next(iter(found.values())).device
    values = torch.stack([value.to(device) for value in found.values()]).tolist()
    return dict(zip(found, values, strict=True))


def _moved(before: float, now: float) -> float:
    larger = max(before, now)
    if before == now or math.isnan(larger):
        return 0.0  # what is no number is refused later
    return 1.0 if math.isinf(larger) else abs(now - before) / larger
