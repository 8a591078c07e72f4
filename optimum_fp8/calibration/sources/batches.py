"""Calibration data that are batches already: a DataLoader or any other iterable."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import torch

from ...config import FP8Config
from ...errors import FP8CalibrationError
from ..batching import batch_size_of, counted
from ..facts import ModelFacts
from ..order import positions
from ..rows.batches import Rows, batches_of_rows
from ..rows.columns import is_sample
from ..source import Source, register_source
from .row_list import as_rows

_TOKENS = ("input_ids", "decoder_input_ids")


@register_source
class Batches(Source):
    """An iterable of batches, or a stream of samples such as texts or images; no more is read than needed.

    Tensors are passed on as they are. Lists and arrays of numbers become tensors, and a row of tokens a batch of one.
    """

    expected = "a DataLoader or another iterable of batches"
    catch_all = True
    honours = ("concatenate_data",)  # of a stream of texts

    def accepts(self, dataset: Any) -> bool:
        return isinstance(dataset, Iterable) and not isinstance(dataset, (str, bytes, Mapping, torch.Tensor))

    def refuse_keys(self, dataset: Any, config: FP8Config) -> None:
        can_shuffle = isinstance(dataset, Sequence)
        super().refuse_keys(dataset, config.replace(shuffle_calibration_samples=False) if can_shuffle else config)

    def batches(self, dataset: Iterable[Any], config: FP8Config, model: ModelFacts) -> Iterator[Any]:
        again = isinstance(dataset, Sequence)
        if isinstance(dataset, Sequence) and config.shuffle_calibration_samples:
            dataset = [dataset[number] for number in positions(len(dataset), config)]
        iterator = iter(dataset)
        first = next(iterator, None)
        everything = iterator if first is None else chain([first], iterator)
        is_batch = isinstance(first, Mapping) and model.main_input in first
        if (is_sample(first) or _is_no_input(first, model)) and not is_batch:
            samples = dataset if again else everything
            return batches_of_rows(Rows(lambda: as_rows(enumerate(samples), config), again), config, model)
        if config.concatenate_data:
            raise FP8CalibrationError("concatenate_data=True packs texts, and the dataset holds batches: drop it")
        return counted(self._batches(everything, config, model), config)

    def _batches(self, batches: Iterable[Any], config: FP8Config, model: ModelFacts) -> Iterator[Any]:
        seen = 0
        for number, batch in enumerate(batches):
            batch = _as_tensors(batch, model.main_input, f"batch {number}")
            seen += batch_size_of(batch)
            yield batch
            if seen >= config.most_samples:
                return


def _is_no_input(first: Any, model: ModelFacts) -> bool:
    """Whether it is a dict that says nothing to the model: as a row it is refused with the names of its columns."""
    if not isinstance(first, Mapping) or any(map(torch.is_tensor, first.values())):
        return False
    return not any(map(model.takes, first))


def _as_tensors(batch: Any, main_input: str, where: str) -> Any:
    """A batch with tensors for lists and arrays of numbers; the very object where there are none."""
    if isinstance(batch, Mapping):
        values = {key: _as_tensor(value, f"{where}, {key!r}") for key, value in batch.items()}
        if any(_is_row(values.get(name)) for name in _TOKENS):  # one sample: so are its mask, its labels, …
            values = {key: value[None] if _is_flat(value) else value for key, value in values.items()}
        return batch if all(value is batch[key] for key, value in values.items()) else values
    if _holds_labels(batch):  # the model is given the first
        first = _as_tensors(batch[0], main_input, where)
        return batch if first is batch[0] else (first, *batch[1:])
    tensor = _as_tensor(batch, where) if getattr(batch, "ndim", 1) else batch
    return tensor[None] if main_input in _TOKENS and _is_row(tensor) else tensor


def _holds_labels(batch: Any) -> bool:
    """Whether it is a pair of an input and labels, as loaders give it, rather than lists of numbers."""
    if isinstance(batch, tuple):
        return bool(batch) and not isinstance(batch[0], (bool, int, float))
    return isinstance(batch, list) and bool(batch) and hasattr(batch[0], "shape")


def _as_tensor(value: Any, where: str) -> Any:
    leaf = value
    while isinstance(leaf, (list, tuple)) and leaf:
        leaf = leaf[0]
    is_array = hasattr(leaf, "__array__") and hasattr(leaf, "shape") and not torch.is_tensor(leaf)
    is_list = isinstance(value, (list, tuple)) and isinstance(leaf, (bool, int, float))
    if not is_list and not is_array:
        return value
    try:
        if isinstance(value, (list, tuple)) and hasattr(value[0], "shape"):  # torch warns of a list of arrays
            return torch.stack([torch.as_tensor(each) for each in value])
        return torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise FP8CalibrationError(
            f"{where} cannot be made a tensor ({error}): expected numbers in rows of one length; pad them and pass an "
            "attention_mask, or make each row a batch of its own"
        ) from None


def _is_row(value: Any) -> bool:
    """Whether they are tokens without the dimension of a batch."""
    return torch.is_tensor(value) and value.ndim == 1 and not value.is_floating_point()


def _is_flat(value: Any) -> bool:
    return torch.is_tensor(value) and value.ndim < 2
