"""Calibration data from the Hub, by the name of the dataset."""

from __future__ import annotations

import os
import re
from typing import Any

from ...config import FP8Config
from ..facts import ModelFacts
from ..rows.batches import Rows
from ..source import RowSource, name_of, register_source
from .hf_dataset import read, rows_of_split, split_of
from .paths import has_suffix_of_data

_NAME = re.compile(r"(\w[\w.-]*/)?\w[\w.-]*")


@register_source
class Hub(RowSource):
    """A dataset on the Hub, streamed: no more of it is fetched than needed."""

    expected = "the name of a dataset on the Hub"
    honours = (*RowSource.honours, "dataset_split", "dataset_config_name", "dataset_revision")

    def accepts(self, dataset: Any) -> bool:
        if not isinstance(dataset, str) or os.path.exists(dataset) or not _NAME.fullmatch(dataset):
            return False
        return (
            not has_suffix_of_data(dataset) if "/" in dataset else "." not in dataset
        )  # else a file that is not there

    def rows(self, dataset: str, config: FP8Config, model: ModelFacts) -> Rows:
        options = {"name": config.dataset_config_name, "revision": config.dataset_revision}
        loaded = read(dataset, dataset, **options, token=model.origin.arguments.get("token"))
        return rows_of_split(split_of(loaded, config, name_of(dataset)), config, name_of(dataset))
