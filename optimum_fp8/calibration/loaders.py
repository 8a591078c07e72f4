"""From whatever a user calls a dataset to batches a model can be called with."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain, islice
from typing import Any

import torch

from ..config import FP8Config
from ..errors import FP8CalibrationError

_TEXT_SUFFIXES = (".txt", ".text", ".md")
_JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")


def batches(config: FP8Config, name_or_path: str) -> Iterator[Any]:
    """Calibration batches: at most `num_calibration_samples` samples of `config.dataset`, in its order.

    Strings (and text columns) are tokenized, cut to `max_seq_length` and, where a batch holds several, padded.
    Rows that hold model inputs already (`input_ids`, `pixel_values`) are collated. Batches of a DataLoader, or of any
    other iterable, are passed on as they are.

    Raises:
        FP8CalibrationError: the data, or the tokenizer or processor it needs, cannot be used; the message says why.
    """
    dataset, samples = config.dataset, config.num_calibration_samples
    if isinstance(dataset, str):
        check_file(dataset)
        return _tokenized(_read_file(dataset, config.text_column), config, name_or_path)
    if isinstance(dataset, (list, tuple)) and dataset and all(isinstance(item, str) for item in dataset):
        return _tokenized(dataset, config, name_or_path)
    if type(dataset).__module__.split(".")[0] == "datasets":
        return _from_datasets(dataset, config, name_or_path)
    if isinstance(dataset, Iterable) and not isinstance(dataset, (Mapping, torch.Tensor)):
        return _as_they_are(dataset, samples)
    raise FP8CalibrationError(
        f"dataset of type {type(dataset).__name__} cannot be used: expected a list of strings, the path of a text or "
        "JSON-lines file, a datasets.Dataset, a DataLoader, an iterable of batches, or a callable that is given the "
        "model"
    )


def check_file(path: str) -> None:
    """Refuse a dataset path that cannot be read, before anything long is started."""
    if not os.path.isfile(path):
        raise FP8CalibrationError(
            f"dataset={path!r} is not a file: expected a local text (.txt) or JSON-lines (.jsonl) file; load hub "
            "datasets with datasets.load_dataset and pass the result"
        )
    suffix = os.path.splitext(path)[1].lower()
    if suffix not in (*_JSON_SUFFIXES, *_TEXT_SUFFIXES):
        raise FP8CalibrationError(f"dataset={path!r} has suffix {suffix!r}: expected .txt, .md, .jsonl or .json")


def _read_file(path: str, column: str) -> Iterator[str]:
    """Paragraph-sized samples of a text file, or the `column` of each line of a JSON-lines file."""
    try:
        yield from _json_lines(path, column) if path.lower().endswith(_JSON_SUFFIXES) else _paragraphs(path)
    except UnicodeDecodeError as error:
        raise FP8CalibrationError(f"dataset={path!r} is not UTF-8 text: {error}") from None


def _json_lines(path: str, column: str) -> Iterator[str]:
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise FP8CalibrationError(f"{path}, line {number} is not JSON: {error}") from None
            if not isinstance(row, dict) or not isinstance(row.get(column), str):
                raise FP8CalibrationError(
                    f"{path}, line {number} has no text under {column!r}: set text_column to one of "
                    f"{sorted(row) if isinstance(row, dict) else 'an object with columns'}"
                )
            yield row[column]


def _paragraphs(path: str) -> Iterator[str]:
    """Runs of paragraphs of at least 2,000 characters: enough context for ranges like those in use."""
    text = ""
    with open(path, encoding="utf-8") as file:
        for line in file:
            text += line
            if not line.strip() and len(text) >= 2000:
                yield text
                text = ""
    if text.strip():
        yield text


def _from_datasets(dataset: Any, config: FP8Config, name_or_path: str) -> Iterator[Any]:
    rows = iter(dataset)
    first = next(rows, None)
    if not isinstance(first, Mapping):
        raise FP8CalibrationError("the dataset is empty, or a dict of splits: pass one split that has rows")
    rows = chain([first], rows)
    if config.text_column in first and isinstance(first[config.text_column], str | None):
        return _tokenized((row[config.text_column] for row in rows), config, name_or_path)
    rows = islice(rows, config.num_calibration_samples)
    if "input_ids" in first or "pixel_values" in first:
        return _collated(rows, config.batch_size)
    image = next((key for key, value in first.items() if hasattr(value, "convert") and hasattr(value, "size")), None)
    if image is not None:
        return _processed(rows, image, config, name_or_path)
    raise FP8CalibrationError(
        f"the dataset has columns {sorted(first)}: expected text in {config.text_column!r} (set text_column), images, "
        "or model inputs such as 'input_ids' or 'pixel_values'"
    )


def _groups(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    iterator = iter(items)
    while group := list(islice(iterator, size)):
        yield group


def _tokenized(texts: Iterable[str], config: FP8Config, name_or_path: str) -> Iterator[Any]:
    tokenizer = _companion("tokenizer", config.tokenizer or config.processor, name_or_path)
    if config.batch_size > 1 and getattr(tokenizer, "pad_token", None) is None:
        raise FP8CalibrationError(
            f"batch_size={config.batch_size} needs padding, but the tokenizer has no pad_token: set it, or use "
            "batch_size=1"
        )

    def generate() -> Iterator[Any]:
        for group in _groups(islice(_with_text(texts), config.num_calibration_samples), config.batch_size):
            yield tokenizer(
                group, return_tensors="pt", truncation=True, max_length=config.max_seq_length, padding=len(group) > 1
            )

    return generate()


def _with_text(texts: Iterable[Any]) -> Iterator[str]:
    """The texts that hold something."""
    for number, text in enumerate(texts):
        if not isinstance(text, str):
            raise FP8CalibrationError(f"sample {number} is {text!r}, not text: clean the column, or set text_column")
        if text.strip():
            yield text


def _processed(rows: Iterable[Any], column: str, config: FP8Config, name_or_path: str) -> Iterator[Any]:
    processor = _companion("processor", config.processor, name_or_path)
    for group in _groups(rows, config.batch_size):
        yield processor(images=[row[column] for row in group], return_tensors="pt")


def _collated(rows: Iterable[Any], size: int) -> Iterator[Any]:
    inputs = ("input_ids", "attention_mask", "token_type_ids", "pixel_values", "input_features", "input_values")
    for group in _groups(rows, size):
        keys = [key for key in inputs if key in group[0]]
        try:
            yield {key: torch.stack([torch.as_tensor(row[key]) for row in group]) for key in keys}
        except RuntimeError:
            raise FP8CalibrationError(
                "rows of different lengths cannot be put into one batch: use batch_size=1, or a DataLoader that pads"
            ) from None


def _as_they_are(dataset: Iterable[Any], samples: int) -> Iterator[Any]:
    seen = 0
    for batch in dataset:
        if seen >= samples:
            return
        seen += batch_size_of(batch)
        yield batch


def batch_size_of(batch: Any) -> int:
    """How many samples a batch holds (1 if it cannot be told)."""
    values = list(batch.values()) if isinstance(batch, Mapping) else batch
    values = list(values) if isinstance(values, (list, tuple)) else [values]
    return next((len(value) for value in values if isinstance(value, torch.Tensor) and value.ndim > 0), 1)


def _companion(kind: str, given: Any, name_or_path: str) -> Any:
    """The tokenizer or processor: the one given, from the path given, or from beside the model."""
    if given is not None and not isinstance(given, str):
        return given
    from transformers import AutoProcessor, AutoTokenizer

    source = given or name_or_path
    if not source:
        raise FP8CalibrationError(f"the dataset needs a {kind} and the model has no path to take it from: pass {kind}=")
    try:
        return (AutoTokenizer if kind == "tokenizer" else AutoProcessor).from_pretrained(source)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise FP8CalibrationError(f"no {kind} at {source!r} ({reason}): pass {kind}= in the config") from None
