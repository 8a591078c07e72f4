"""A check: something that looks at the measurements now and then while they grow, and may end the calibration."""

from __future__ import annotations

from typing import Any, Protocol

from ..measure import Measurements


class Check(Protocol):
    """What `calibrate(…, checks=[…])` calls between batches.

    The measurements are those of the data so far, of all processes together. A check sees the same at the same places,
    whatever the number of processes: rounds of batches end where one `is_due`.
    """

    def is_due(self, batches: int) -> bool:
        """Whether it looks after so many batches; the answer depends on the number alone."""

    def note(self, measurements: Measurements, batches: int, samples: int) -> bool:
        """Look at the measurements after so many batches and samples; True ends the calibration."""

    def state(self) -> dict[str, Any]:
        """What it has to remember where a calibration that was broken off goes on, as JSON."""

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what `state` gave."""
