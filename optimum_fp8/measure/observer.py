"""The observer interface: statistics of a tensor, each declared with its shape and with how two of them are merged.

A new observer is one file that defines a subclass and registers it; the store writes, reads, checks and merges whatever
the class declares. Files in the folder `observers` are found by themselves, others count from when they are imported:

    @register_observer
    class Peak(Observer):
        name = "peak"
        STATISTICS = {"peak": Statistic(torch.maximum)}

        def update(self, x):
            self.accumulate(peak=x.abs().amax().float())

        def range(self):
            return self.statistics()["peak"]
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, TypeVar

import torch

from ..errors import FP8ConfigError, FP8MeasurementError, nearest
from ..formats import NumberFormat


@dataclass(frozen=True)
class Statistic:
    """The declaration of one tensor that an observer keeps.

    Attributes:
        reduce: merges two of them, in any order and grouping alike: `torch.maximum`, `torch.add`. It is used across
            batches, runs and ranks.
        shape: of the tensor, `()` for a scalar, `(bins,)` for a histogram, `(None,)` for an axis of any size.
        per_head: there is one for each head, `(heads, *shape)`; only for tensors that have heads.
        optional: it may be absent: two merge where both are there and have the same shape, else it is dropped. So it is
            in any case per head, and with an axis of any size.
    """

    reduce: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    shape: tuple[int | None, ...] = ()
    per_head: bool = False
    optional: bool = False

    @property
    def required(self) -> bool:
        """Whether everything that was seen has one."""
        return not (self.per_head or self.optional or None in self.shape)

    def fits(self, value: torch.Tensor) -> bool:
        """Whether a tensor has the declared shape."""
        own = value.shape[int(self.per_head) :]
        sizes = zip(self.shape, own, strict=False)
        return value.ndim == self.per_head + len(self.shape) and all(size in (None, found) for size, found in sizes)


@dataclass(frozen=True)
class Context:
    """What an observer is told when it is made.

    Attributes:
        module: name of the module.
        kind: which of its tensors it observes: "input", "weight", ….
        folder: where observers that write files put them; None: nowhere.
        percentile: share of values, in percent, that a range holds where observers cut off the rest.
    """

    module: str = ""
    kind: str = ""
    folder: str | None = None
    percentile: float = 99.99


@dataclass(frozen=True)
class Purpose:
    """What a range is for, for observers whose choice depends on it.

    Attributes:
        fmt: the number format.
        scale_of: the scales that follow from ranges, float32 of any shape: backoff and rounding included.
    """

    fmt: NumberFormat
    scale_of: Callable[[torch.Tensor], torch.Tensor]


class Observer(ABC):
    """Statistics of one tensor over everything seen: all that it knows is in them.

    Attributes:
        name: what configurations and measurement files call the class.
        STATISTICS: what it keeps, by names of letters, digits and underscores. Observers that declare the same
            statistics read each other's files.
        not_mergeable: why two cannot be merged, as messages say it; empty: they can, and what they become is as if one
            had seen everything. Where modules share a tensor, it is then observed once.
        context: what this one was told.
    """

    name: ClassVar[str]
    STATISTICS: ClassVar[Mapping[str, Statistic]]
    not_mergeable: ClassVar[str] = ""
    context: Context = Context()

    def __init__(self, **statistics: torch.Tensor):
        self._statistics: dict[str, torch.Tensor] = {}
        if statistics:
            self.accumulate(**statistics)

    @classmethod
    def made_for(cls, context: Context) -> Observer:
        """An observer that has seen nothing, of one tensor."""
        observer = cls()
        observer.context = context
        return observer

    @classmethod
    def from_range(cls, maxabs: torch.Tensor, count: int) -> Observer | None:
        """An observer of a tensor of which only the largest magnitude is known; None if that is not enough for it."""
        return None

    @abstractmethod
    def update(self, x: torch.Tensor) -> None:
        """Accumulate the statistics of `x` (non-empty, any floating-point dtype, no gradient), on its own device.

        It runs inside the model's forward pass: it should not wait for the device.
        """

    def update_per_head(self, x: torch.Tensor) -> None:
        """As `update`, for `[tokens, heads, size]`; observers that keep nothing per head see it as any tensor."""
        self.update(x)

    @abstractmethod
    def range(self) -> torch.Tensor:
        """The value that scales are taken from, a float32 scalar: max|x|, or less where outliers are cut off.

        It is Inf or NaN where anything seen was: what is not finite must not be lost.
        """

    def range_for(self, purpose: Purpose) -> torch.Tensor:
        """As `range`, where the best one depends on what it is for."""
        return self.range()

    def largest(self) -> torch.Tensor:
        """max|x|, a float32 scalar, where it is known; else the range."""
        return self._statistics.get("maxabs", self.range())

    def range_per_head(self) -> torch.Tensor | None:
        """As `range`, of each head: float32 `(heads,)`; None where it is not known."""
        return None

    def count(self) -> torch.Tensor | None:
        """How many values were seen, an int64 scalar; None where the statistics do not tell (there is no "count")."""
        return self._statistics.get("count")

    def accumulate(self, **statistics: torch.Tensor) -> None:
        """Reduce these into what is known.

        Raises:
            FP8MeasurementError: they are not what the class declares.
        """
        self._check(statistics)
        if self._statistics:
            statistics = {
                key: declared.reduce(self._statistics[key], statistics[key].to(self._statistics[key].device))
                for key, declared in self.STATISTICS.items()
                if key in self._statistics and key in statistics
                if self._statistics[key].shape == statistics[key].shape
            }
        self._statistics = statistics

    def merge(self, other: Observer) -> None:
        """Reduce what another observer of the same kind has seen into this one.

        Raises:
            FP8MeasurementError: it is of another kind, or of one that cannot be merged.
        """
        if type(other) is not type(self):
            raise FP8MeasurementError(
                f"statistics of the observers {self.name!r} and {other.name!r} cannot be merged: measure both with one"
            )
        if self._statistics and other._statistics and self.not_mergeable:
            raise FP8MeasurementError(f"statistics of observer={self.name!r} cannot be merged: {self.not_mergeable}")
        if other._statistics:
            self.accumulate(**other._statistics)

    def agrees(self, other: Observer) -> bool:
        """Whether another one has the same statistics, to the bit."""
        mine, theirs = self.statistics(), other.statistics()
        return mine.keys() == theirs.keys() and all(torch.equal(_bits(mine[key]), _bits(theirs[key])) for key in mine)

    def statistics(self) -> dict[str, torch.Tensor]:
        """The statistics that there are, by name; none before the first update."""
        return dict(self._statistics)

    def _check(self, statistics: Mapping[str, torch.Tensor]) -> None:
        required = {key for key, declared in self.STATISTICS.items() if declared.required}
        if not required <= statistics.keys() <= self.STATISTICS.keys():
            raise FP8MeasurementError(
                f"observer {self.name!r}: found statistics {sorted(statistics)}, expected {sorted(required)}, and of "
                f"{sorted(self.STATISTICS.keys() - required)} those that are known"
            )
        for key, value in statistics.items():
            declared = self.STATISTICS[key]
            if not declared.fits(value):
                shape = str(declared.shape).replace("None", "any")
                expected = f"(heads, {shape.strip('(,)')})" if declared.per_head else shape
                raise FP8MeasurementError(
                    f"observer {self.name!r}: statistic {key!r} has shape {tuple(value.shape)}, expected {expected}"
                )


def _bits(value: torch.Tensor) -> torch.Tensor:
    return value.cpu().reshape(-1).view(torch.uint8)  # NaN is NaN


OBSERVERS: dict[str, type[Observer]] = {}

_Class = TypeVar("_Class", bound=type[Observer])


def register_observer(cls: _Class) -> _Class:
    """Make an observer known by its `name`; usable as a decorator.

    Raises:
        FP8ConfigError: the name belongs to another class already.
    """
    known = OBSERVERS.setdefault(cls.name, cls)
    if (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
        raise FP8ConfigError(
            f"observer {cls.name!r} is {known.__module__}.{known.__qualname__} already: name "
            f"{cls.__module__}.{cls.__qualname__} otherwise"
        )
    OBSERVERS[cls.name] = cls  # the same class again, from a module or a notebook's cell that was run anew
    return cls


def observer_class(name: str) -> type[Observer]:
    """The observer registered as `name`.

    Raises:
        FP8ConfigError: there is none; the message says which is nearest.
    """
    if name not in OBSERVERS:
        raise FP8ConfigError(f"observer={name!r} is not known: {nearest(name, OBSERVERS)}")
    return OBSERVERS[name]
