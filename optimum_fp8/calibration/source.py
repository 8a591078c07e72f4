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

import gzip
import os
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import islice
from typing import Any, BinaryIO, ClassVar, TypeVar, cast

from torch import nn

from ..config import FP8Config
from ..errors import FP8CalibrationError
from .facts import ModelFacts, facts_of
from .order import drawn
from .rows.batches import Rows, batches_of_rows
from .rows.columns import Row

_COMPRESSED = ".gz"


class Source(ABC):
    """A kind of calibration data.

    Attributes:
        expected: the kind in words, for the message that lists what can be used.
        catch_all: it accepts what more specific kinds accept too, and is asked after them.
        honours: keys of the config, of those that only some kinds know, that mean something to this one.
    """

    expected: ClassVar[str]
    catch_all: ClassVar[bool] = False
    honours: ClassVar[tuple[str, ...]] = ()

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
        """Batches a model can be called with: at most `most_samples` of the config, made as they are asked for.

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
        self.refuse_keys(dataset, config)
        batches = iter(self.batches(dataset, config, model))
        for first in islice(batches, 1):
            return _again(first, batches)
        raise FP8CalibrationError(f"{name_of(dataset)} is empty: expected at least one sample")

    def refuse_keys(self, dataset: Any, config: FP8Config) -> None:
        """Refuse keys of the config that this kind of data would pass over.

        Raises:
            FP8CalibrationError: the message says which.
        """
        for key, otherwise in _OF_SOME.items():
            value = getattr(config, key)
            if value not in (None, False) and key not in self.honours:
                raise FP8CalibrationError(f"{key}={value!r} does not go with {self.expected}: {otherwise}")

    def run(self, dataset: Any, model: nn.Module, config: FP8Config, forward: Callable[[Iterator[Any]], None]) -> None:
        """Call `forward` with the batches for `model`; data that call the model by themselves do that instead."""
        self.refuse_keys(dataset, config)
        forward(self.batches(dataset, config, facts_of(model)))


def _again(first: Any, batches: Iterator[Any]) -> Iterator[Any]:
    """All the batches, of which the first has been taken; to be closed where not all are wanted."""
    yield first
    yield from batches


_OF_SOME = {  # keys that not every kind of data honours, and what to do otherwise
    "shuffle_calibration_samples": "shuffle the data beforehand, and drop the key",
    "concatenate_data": "it is for texts; pack the data beforehand, and drop the key",
    "dataset_split": "it is for a dict of splits, a folder, or the name of a dataset on the Hub; drop it",
    "dataset_config_name": "it is for a folder, or the name of a dataset on the Hub; drop it",
    "dataset_revision": "it is for the name of a dataset on the Hub; drop it",
}


class RowSource(Source):
    """Samples as rows, the columns of which say what they hold."""

    honours: ClassVar[tuple[str, ...]] = ("shuffle_calibration_samples", "concatenate_data")

    @abstractmethod
    def rows(self, dataset: Any, config: FP8Config, model: ModelFacts) -> Rows:
        """The samples, in the order that the config asks for."""

    def batches(self, dataset: Any, config: FP8Config, model: ModelFacts) -> Iterator[Any]:
        return batches_of_rows(self.rows(dataset, config, model), config, model)


class TableSource(RowSource):
    """Rows in a local file, by its suffix.

    Attributes:
        suffixes: of the files, in lower case, with their dots.
        compressed: whether files may be compressed (.gz): `opened` reads them.
    """

    suffixes: ClassVar[tuple[str, ...]]
    compressed: ClassVar[bool] = False

    @abstractmethod
    def rows_in(self, path: str, config: FP8Config) -> Iterator[Row]:
        """The samples in the file."""

    def accepts(self, dataset: Any) -> bool:
        if not isinstance(dataset, str) or os.path.isdir(dataset):
            return False
        suffix = suffix_of(dataset) if self.compressed else os.path.splitext(dataset)[1].lower()
        return suffix in self.suffixes

    def check(self, dataset: str) -> None:
        if not os.path.isfile(dataset):
            raise _unusable_path(dataset)

    def rows(self, dataset: str, config: FP8Config, model: ModelFacts) -> Rows:
        make: Callable[[], Iterator[Row]] = partial(self._read, dataset, config)
        if config.shuffle_calibration_samples:
            kept = drawn(make(), config)
            make = partial(iter, kept)
        return Rows(make, folder=os.path.dirname(dataset), name=name_of(dataset))

    def _read(self, path: str, config: FP8Config) -> Iterator[Row]:
        """The samples, with errors of reading the file as ours."""
        try:
            yield from self.rows_in(path, config)
        except UnicodeDecodeError as error:
            raise FP8CalibrationError(f"dataset={path!r} is not UTF-8 text: {error}") from None
        except (OSError, EOFError, zlib.error) as error:
            raise FP8CalibrationError(f"dataset={path!r} cannot be read: {error}") from None


class FileSource(TableSource):
    """Text in a local file, by its suffix."""

    @abstractmethod
    def texts(self, path: str, config: FP8Config) -> Iterator[str]:
        """The samples in the file."""

    def rows_in(self, path: str, config: FP8Config) -> Iterator[Row]:
        for number, text in enumerate(self.texts(path, config)):
            yield Row(f"{path}, sample {number}", {config.text_column: text})


def opened(path: str) -> BinaryIO:
    """A file in binary mode, without its compression."""
    return cast(BinaryIO, (gzip.open if path.lower().endswith(_COMPRESSED) else open)(path, "rb"))


def suffix_of(path: str) -> str:
    """The suffix of a path in lower case, that before a compression's."""
    stem, suffix = os.path.splitext(path.lower())
    return os.path.splitext(stem)[1] if suffix == _COMPRESSED else suffix


def name_of(dataset: Any) -> str:
    """How a dataset is called in messages."""
    return f"the dataset={dataset!r}" if isinstance(dataset, str) else "the dataset"


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
    if isinstance(dataset, Mapping):
        raise FP8CalibrationError(
            f"dataset of type {type(dataset).__name__} with the keys {sorted(map(str, dataset))} is no dict of splits: "
            "put a batch or a row into a list, [dataset]; of columns make a datasets.Dataset.from_dict(dataset)"
        )
    raise FP8CalibrationError(
        f"dataset of type {type(dataset).__name__} cannot be used: expected "
        f"{'; '.join(source.expected for source in _in_order())}"
    )


def _in_order() -> list[Source]:
    return sorted(SOURCES, key=lambda source: source.catch_all)


def _unusable_path(path: str) -> FP8CalibrationError:
    kinds = [source for source in _in_order() if isinstance(source, TableSource)]
    suffixes = ", ".join(suffix for kind in kinds for suffix in kind.suffixes)
    if os.path.isfile(path):
        return FP8CalibrationError(f"dataset={path!r} has suffix {suffix_of(path)!r}: expected {suffixes}")
    return FP8CalibrationError(
        f"dataset={path!r} is not a file: expected a local file ({suffixes}), a folder, or the name of a dataset on "
        "the Hub"
    )
