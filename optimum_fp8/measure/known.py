"""Ranges out of a checkpoint: of all that was measured, what the scales in it were derived from, and no more."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from ..errors import FP8MeasurementError
from .observer import Observer, Purpose, Statistic
from .store import Ranges

_Ranges = dict[str, float]  # by target


class KnownRange(Observer):
    """The range of one tensor, as some observer chose it for each target; nothing more can be measured with it.

    Args:
        ranges: by target; empty where scales follow from the ranges of heads alone.
        largest: max|x|, where it was needed besides.
        per_head: the ranges of heads, where they were needed.
    """

    name = "known"
    STATISTICS: ClassVar[Mapping[str, Statistic]] = {}

    def __init__(self, ranges: _Ranges, largest: float | None = None, per_head: list[float] | None = None):
        super().__init__()
        self.ranges, self._largest, self.heads = ranges, largest, per_head

    def update(self, x: torch.Tensor) -> None:
        raise FP8MeasurementError("this range was read from a checkpoint: measure the original model instead")

    def range(self) -> torch.Tensor:
        return torch.tensor(max([*self.ranges.values(), *(self.heads or ())], default=self._largest))

    def range_for(self, purpose: Purpose) -> torch.Tensor:
        found = self.ranges.get(purpose.fmt.target)
        return self.range() if found is None else torch.tensor(found)

    def largest(self) -> torch.Tensor:
        return self.range() if self._largest is None else torch.tensor(self._largest)

    def range_per_head(self) -> torch.Tensor | None:
        return None if self.heads is None else torch.tensor(self.heads)

    def plain(self) -> Any:
        """As JSON: a number where that is all."""
        one = set(self.ranges.values())
        said = {
            "range": one.pop() if len(one) == 1 else self.ranges or None,
            "largest": self._largest,
            "per_head": self.heads,
        }
        said = {name: value for name, value in said.items() if value is not None}
        return said["range"] if list(said) == ["range"] and not isinstance(said["range"], dict) else said

    @classmethod
    def from_plain(cls, said: Any, targets: tuple[str, ...]) -> KnownRange:
        """What `plain` gave; a range that is one number is that of all `targets`.

        Raises:
            ValueError: it is nothing of the kind, or a range is negative or not finite.
        """
        if not isinstance(said, dict):
            said = {"range": said}
        found, largest, heads = said.get("range", {}), said.get("largest"), said.get("per_head")
        ranges = found if isinstance(found, dict) else dict.fromkeys(targets, found)
        values = [*ranges.values(), *([] if largest is None else [largest]), *(heads or [])]
        sound = all(isinstance(value, float | int) and 0 <= value < float("inf") for value in values)
        if not values or not sound or not said.keys() <= {"range", "largest", "per_head"}:
            raise ValueError(f"{said!r} is no range")
        return cls(ranges, largest, heads)


@dataclass(frozen=True)
class AskedRanges(Ranges):
    """The ranges of one module's tensors, which remember what was asked of them: `known`, by kind."""

    known: dict[str, KnownRange] = field(default_factory=dict)

    def of(self, kind: str, purpose: Purpose | None = None) -> torch.Tensor:
        found = super().of(kind, purpose)
        if purpose is not None:
            self._at(kind).ranges[purpose.fmt.target] = float(found)
        return found

    def largest(self, kind: str) -> torch.Tensor:
        found = super().largest(kind)
        self._at(kind)._largest = float(found)
        return found

    def per_head(self, kind: str) -> torch.Tensor | None:
        found = super().per_head(kind)
        if found is not None:
            self._at(kind).heads = found.tolist()
        return found

    def _at(self, kind: str) -> KnownRange:
        return self.known.setdefault(kind, KnownRange({}))
