"""Calibration data from the library `datasets`: text, images, audio, or model inputs, as the columns say."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from ...config import FP8Config
from ...errors import FP8CalibrationError, nearest
from ..facts import ModelFacts
from ..order import BUFFER, positions
from ..rows.batches import Rows
from ..rows.columns import Row
from ..source import RowSource, register_source
from .row_list import as_rows

_SLICE = re.compile(r"(?P<name>[^\[\]]+)(?:\[(?P<start>\d*)(?P<a>%?):(?P<stop>\d*)(?P<b>%?)\])?")


@register_source
class HFDataset(RowSource):
    """Splits of the library `datasets`, in memory or streamed, or a column of one.

    Rows that hold model inputs already are collated, else text is tokenized and images go through the processor.
    """

    expected = "a datasets.Dataset, or a dict of its splits"
    honours = (*RowSource.honours, "dataset_split")

    def accepts(self, dataset: Any) -> bool:
        return type(dataset).__module__.split(".")[0] == "datasets"

    def rows(self, dataset: Any, config: FP8Config, model: ModelFacts) -> Rows:
        return rows_of_split(split_of(dataset, config), config)


def split_of(dataset: Any, config: FP8Config, name: str = "the dataset") -> Any:
    """The split that the config asks for, or the only one there is, or the part of it that the config asks for.

    Raises:
        FP8CalibrationError: there is no such split, or several, and the config does not say which.
    """
    wanted, splits = config.dataset_split, dataset if isinstance(dataset, Mapping) else None
    if wanted is None:
        if splits is None:
            return dataset
        if len(splits) != 1:
            raise FP8CalibrationError(
                f"{name} has the splits {sorted(map(str, splits))}: set dataset_split to one of them"
            )
        return next(iter(splits.values()))
    found = _SLICE.fullmatch(wanted)
    if splits is None:
        splits = {str(getattr(dataset, "split", None) or ""): dataset}
        if found is None or found["name"] not in splits:
            raise FP8CalibrationError(
                f"dataset_split={wanted!r}, and {name} is one split already{_named(splits)}: drop dataset_split"
            )
    if found is None or found["name"] not in splits:
        raise FP8CalibrationError(
            f"dataset_split={wanted!r} is no split of {name}: {nearest(wanted, map(str, splits))}, each as it is or "
            "as a slice such as 'train[:100]'"
        )
    return _part(splits[found["name"]], found, wanted)


def rows_of_split(split: Any, config: FP8Config, name: str = "the dataset") -> Rows:
    """The rows of one split, or the values of one column."""
    features = getattr(split, "features", None)  # unknown for some streams, and of a column its own
    kinds = {key: type(value).__name__ for key, value in features.items()} if isinstance(features, Mapping) else {}
    images, audio = (tuple(key for key in kinds if kinds[key] == kind) for kind in ("Image", "Audio"))
    if not hasattr(split, "__len__"):
        if config.shuffle_calibration_samples:
            if not hasattr(split, "shuffle"):
                raise FP8CalibrationError(f"{name} is a column of a stream: shuffle the stream, and drop the key")
            split = split.shuffle(seed=config.calibration_seed, buffer_size=BUFFER)
        return Rows(lambda: _explained(enumerate(split), config, name), False, images, audio, name=name)
    own = isinstance(getattr(split, "format", None), Mapping) and split.format["type"] == "custom"
    if not own and hasattr(split, "with_format"):
        split = _plain(split, (*images, *audio))
    order = positions(len(split), config)
    return Rows(lambda: _explained(_ordered(split, order), config, name), not own, images, audio, name=name)


def read(dataset: str, *arguments: Any, **options: Any) -> Any:
    """What the library's `load_dataset` streams, with its errors as ours.

    Raises:
        FP8CalibrationError: it cannot be read or reached; what the library says first comes with it.
    """
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    try:
        return load_dataset(*arguments, streaming=True, **options)
    except ConnectionError as error:
        raise FP8CalibrationError(
            f"dataset={dataset!r} is neither a local file nor a folder, and the Hub cannot be reached "
            f"({_first(error)}): pass local data, or run where there is a connection"
        ) from error
    except (DatasetsError, OSError, ValueError, RuntimeError, ImportError) as error:
        hint = "; set dataset_config_name" if "onfig" in str(error) else ""
        raise FP8CalibrationError(f"dataset={dataset!r} cannot be read: {_first(error)}{hint}") from error


def _part(split: Any, found: re.Match[str], wanted: str) -> Any:
    """A slice of a split, in rows or per cent."""
    if found["start"] is None:
        return split
    info = (getattr(getattr(split, "info", None), "splits", None) or {}).get(found["name"])
    count: Any = len(split) if hasattr(split, "__len__") else getattr(info, "num_examples", None)
    if count is None and (found["a"] or found["b"]):
        raise FP8CalibrationError(
            f"dataset_split={wanted!r} is in per cent, and how many rows a stream has is not known: expected numbers "
            "of rows, such as 'train[:100]'"
        )
    start, stop = (
        None if not number else round(int(number) * count / 100) if percent else int(number)
        for number, percent in ((found["start"], found["a"]), (found["stop"], found["b"]))
    )
    if hasattr(split, "select"):
        return split.select(range(*slice(start, stop).indices(len(split))))
    split = split.skip(start) if start else split
    return split if stop is None else split.take(max(stop - (start or 0), 0))


def _plain(split: Any, media: Iterable[str]) -> Any:
    """A dataset that gives plain values, and of images and audio the files: they are opened when they are used."""
    columns = split.format["columns"]
    split = split.with_format(None)
    split = split.select_columns(columns) if columns != split.column_names else split
    for name in media:
        if name in split.column_names:
            feature = split.features[name]
            if getattr(feature, "mode", None) is None:
                split = split.cast_column(name, type(feature)(decode=False))
    return split


def _ordered(split: Any, order: Any) -> Iterator[tuple[int, Any]]:
    if isinstance(order, range):
        yield from enumerate(split)
    else:
        yield from ((number, split[number]) for number in order)


def _explained(samples: Iterable[tuple[int, Any]], config: FP8Config, name: str) -> Iterator[Row]:
    """Samples as rows, with the library's errors as ours."""
    from datasets.exceptions import DatasetsError

    number = -1
    try:
        for row in as_rows(samples, config):
            number += 1
            yield row
    except (DatasetsError, OSError, ImportError, RuntimeError, ValueError) as error:
        if isinstance(error, FP8CalibrationError):
            raise
        raise FP8CalibrationError(f"{name} cannot be read at sample {number + 1}: {_first(error)}") from error


def _named(splits: Mapping[str, Any]) -> str:
    name = next(iter(splits))
    return f", {name!r}" if name else ""


def _first(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
