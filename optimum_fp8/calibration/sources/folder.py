"""Calibration data from a folder: one of the library `datasets`, of files of rows, of text, of images, or of audio."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

from ...config import FP8Config
from ...errors import FP8CalibrationError
from ..facts import ModelFacts
from ..rows.batches import Rows
from ..rows.columns import AUDIO_SUFFIXES
from ..source import RowSource, name_of, register_source, suffix_of
from .hf_dataset import read, rows_of_split, split_of
from .paths import rows_of_files
from .text_file import TextFile

_SAVED = ("dataset_dict.json", "dataset_info.json")  # what `save_to_disk` writes


@register_source
class Folder(RowSource):
    """A folder that `save_to_disk` has written, one with files of text or audio, or what `load_dataset` takes."""

    expected = "the path of a folder of data"
    honours = (*RowSource.honours, "dataset_split", "dataset_config_name")

    def accepts(self, dataset: Any) -> bool:
        return isinstance(dataset, str) and os.path.isdir(dataset)

    def check(self, dataset: str) -> None:
        if not any(_files(dataset)):
            raise FP8CalibrationError(f"dataset={dataset!r} is a folder without files: expected files of data in it")

    def rows(self, dataset: str, config: FP8Config, model: ModelFacts) -> Rows:
        name = name_of(dataset)
        if any(os.path.isfile(os.path.join(dataset, file)) for file in _SAVED):
            return rows_of_split(split_of(_saved(dataset), config, name), config, name)
        files = sorted(_files(dataset))
        data = [file for file in files if os.path.basename(file).lower() != "readme.md"] or files
        for suffixes in (AUDIO_SUFFIXES, TextFile.suffixes):
            if all(suffix_of(file) in suffixes for file in data):
                self._refuse_split(config, name)
                return rows_of_files(data, config, model, name)
        loaded = read(dataset, dataset, name=config.dataset_config_name)
        return rows_of_split(split_of(loaded, config, name), config, name)

    def _refuse_split(self, config: FP8Config, name: str) -> None:
        for key in ("dataset_split", "dataset_config_name"):
            if getattr(config, key) is not None:
                raise FP8CalibrationError(f"{key}={getattr(config, key)!r}, and {name} holds plain files: drop it")


def _saved(folder: str) -> Any:
    from datasets import load_from_disk

    try:
        return load_from_disk(folder)
    except (OSError, ValueError, KeyError) as error:
        raise FP8CalibrationError(f"dataset={folder!r} cannot be read: {error}") from error


def _files(folder: str) -> Iterator[str]:
    """The files in a folder and those in it, without hidden ones."""
    for place, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (os.path.join(place, name) for name in files if not name.startswith("."))
