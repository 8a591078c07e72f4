"""From samples to batches, for all kinds of calibration data: groups, tokenized text, the size of a batch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

import torch

from ..config import FP8Config
from ..errors import FP8CalibrationError


def groups(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """Lists of `size` items, the last one of what is left."""
    iterator = iter(items)
    while group := list(islice(iterator, size)):
        yield group


def tokenized(texts: Iterable[Any], config: FP8Config, name_or_path: str) -> Iterator[Any]:
    """Batches of texts: tokenized, cut to `max_seq_length` and, where a batch holds several, padded; blank ones are
    left out.

    Args:
        texts: strings.
        config: says the tokenizer, and how many texts of what length.
        name_or_path: of the model, where a tokenizer is looked for.

    Raises:
        FP8CalibrationError: there is no tokenizer, it cannot pad, or a text is none.
    """
    tokenizer = companion("tokenizer", config.tokenizer or config.processor, name_or_path)
    if config.batch_size > 1 and getattr(tokenizer, "pad_token", None) is None:
        raise FP8CalibrationError(
            f"batch_size={config.batch_size} needs padding, but the tokenizer has no pad_token: set it, or use "
            "batch_size=1"
        )

    def generate() -> Iterator[Any]:
        for group in groups(islice(_with_text(texts), config.num_calibration_samples), config.batch_size):
            yield tokenizer(
                group, return_tensors="pt", truncation=True, max_length=config.max_seq_length, padding=len(group) > 1
            )

    return generate()


def _with_text(texts: Iterable[Any]) -> Iterator[str]:
    for number, text in enumerate(texts):
        if not isinstance(text, str):
            raise FP8CalibrationError(f"sample {number} is {text!r}, not text: clean the column, or set text_column")
        if text.strip():
            yield text


def companion(kind: str, given: Any, name_or_path: str) -> Any:
    """The tokenizer or processor: the one given, from the path given, or from beside the model.

    Raises:
        FP8CalibrationError: there is none.
    """
    if given is not None and not isinstance(given, str):
        return given
    source = given or name_or_path
    if not source:
        raise FP8CalibrationError(f"the dataset needs a {kind} and the model has no path to take it from: pass {kind}=")
    from transformers import AutoProcessor, AutoTokenizer

    try:
        return (AutoTokenizer if kind == "tokenizer" else AutoProcessor).from_pretrained(source)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise FP8CalibrationError(f"no {kind} at {source!r} ({reason}): pass {kind}= in the config") from None


def batch_size_of(batch: Any) -> int:
    """How many samples a batch holds (1 if it cannot be told)."""
    values = list(batch.values()) if isinstance(batch, Mapping) else batch
    values = list(values) if isinstance(values, (list, tuple)) else [values]
    return next((len(value) for value in values if isinstance(value, torch.Tensor) and value.ndim > 0), 1)
