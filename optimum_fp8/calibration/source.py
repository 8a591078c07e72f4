"""The interface of a kind of calibration data: what it accepts, whether it can be used, and the batches it gives.

A new kind is one file that defines a subclass and registers it. Files in the folder `sources` are found by themselves,
others count from when they are imported:

    @register_source
    class Prompts(Source):
        expected = "an object with prompts"

        def accepts(self, dataset):
            return hasattr(dataset, "prompts")

        def batches(self, dataset, config, model):
            return tokenized(dataset.prompts, config, model)
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice
from typing import Any, ClassVar, TypeVar

from torch import nn

from ..config import FP8Config
from ..errors import FP8CalibrationError
from .batching import tokenized
from .facts import ModelFacts, facts_of

_Sample = TypeVar("_Sample")


class Source(ABC):
    """A kind of calibration data.

    Attributes:
        expected: the kind in words, for the message that lists what can be used.
        catch_all: it accepts what more specific kinds accept too, and is asked after them.
    """

    expected: ClassVar[str]
    catch_all: ClassVar[bool] = False

    @abstractmethod
    def accepts(self, dataset: Any) -> bool:
        """Whether `dataset` is of this kind; nothing is taken from it."""

    def check(self, dataset: Any) -> None:  # noqa: B027  (most kinds have nothing to check)
        """Refuse data that cannot be used, as far as can be told without taking anything from it.

        Raises:
            FP8CalibrationError: the message says why.
        """

    @abstractmethod
    def batches(self, dataset: Any, config: FP8Config, model: ModelFacts) -> Iterator[Any]:
        """Batches a model can be called with: at most `num_calibration_samples` samples, in the data's order.

        Args:
            dataset: what `accepts` and `check` have let pass.
            config: how the samples become batches.
            model: what has to be known of the model: where it came from, which inputs it takes.

        Raises:
            FP8CalibrationError: the data, or the tokenizer or processor they need, cannot be used.
        """

    def opened(self, dataset: Any, config: FP8Config, model: ModelFacts) -> Iterator[Any] | None:
        """The batches, the first of them made: what is wrong with the data shows before anything long is started.

        None for data that call the model by themselves.

        Raises:
            FP8CalibrationError: as `batches`, or there is no sample.
        """
        batches = iter(self.batches(dataset, config, model))
        first = list(islice(batches, 1))
        if not first:
            name = f"={dataset!r}" if isinstance(dataset, str) else ""
            raise FP8CalibrationError(f"the dataset{name} is empty: expected at least one sample")
        return chain(first, batches)

    def run(self, dataset: Any, model: nn.Module, config: FP8Config, forward: Callable[[Iterator[Any]], None]) -> None:
        """Call `forward` with the batches for `model`; data that call the model by themselves do that instead."""
        forward(self.batches(dataset, config, facts_of(model)))


class FileSource(Source):
    """Text in a local file, by its suffix.

    Attributes:
        suffixes: of the files, in lower case, with their dots.
    """

    suffixes: ClassVar[tuple[str, ...]]

    @abstractmethod
    def texts(self, path: str, config: FP8Config) -> Iterator[str]:
        """The samples in the file."""

    def accepts(self, dataset: Any) -> bool:
        return isinstance(dataset, str) and _suffix(dataset) in self.suffixes

    def check(self, dataset: str) -> None:
        if not os.path.isfile(dataset):
            raise _unusable_path(dataset)

    def batches(self, dataset: str, config: FP8Config, model: ModelFacts) -> Iterator[Any]:
        return tokenized(self.decoded(dataset, self.texts(dataset, config)), config, model)

    def decoded(self, path: str, samples: Iterable[_Sample]) -> Iterator[_Sample]:
        """The samples, with errors of reading the file as ours."""
        try:
            yield from samples
        except UnicodeDecodeError as error:
            raise FP8CalibrationError(f"dataset={path!r} is not UTF-8 text: {error}") from None
        except OSError as error:
            raise FP8CalibrationError(f"dataset={path!r} cannot be read: {error}") from None


SOURCES: list[Source] = []  # the latest first

_Class = TypeVar("_Class", bound=type[Source])


def register_source(cls: _Class) -> _Class:
    """Make a kind of data known, to be asked before those known already; usable as a decorator."""
    SOURCES.insert(0, cls())
    return cls


def check_dataset(dataset: Any) -> Source:
    """The source that takes `dataset`, which it has checked; to be called before anything long is started.

    Raises:
        FP8CalibrationError: no source accepts it, or the one that does refuses it.
    """
    for source in _in_order():
        if source.accepts(dataset):
            source.check(dataset)
            return source
    if isinstance(dataset, str):
        raise _unusable_path(dataset)
    raise FP8CalibrationError(
        f"dataset of type {type(dataset).__name__} cannot be used: expected "
        f"{'; '.join(source.expected for source in _in_order())}"
    )


def _in_order() -> list[Source]:
    return sorted(SOURCES, key=lambda source: source.catch_all)


def _suffix(path: str) -> str:
    return os.path.splitext(path)[1].lower()


def _unusable_path(path: str) -> FP8CalibrationError:
    kinds = [source for source in _in_order() if isinstance(source, FileSource)]
    suffixes = ", ".join(suffix for kind in kinds for suffix in kind.suffixes)
    if os.path.isfile(path):
        return FP8CalibrationError(f"dataset={path!r} has suffix {_suffix(path)!r}: expected {suffixes}")
    return FP8CalibrationError(
        f"dataset={path!r} is not a file: expected a local file ({suffixes}); load hub datasets with "
        "datasets.load_dataset and pass the result"
    )
