"""From samples to batches, for all kinds of calibration data: groups, tokenized text, rows, the size of a batch."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

import torch

from ..config import FP8Config
from ..errors import FP8CalibrationError
from ..lifecycle import Origin
from .facts import ModelFacts
from .packing import packed

logger = logging.getLogger(__name__)

# What becomes an input of this name, other than text.
_DATA_FOR = {"pixel_values": "images, or ", "input_values": "audio, or ", "input_features": "audio, or "}


def groups(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """Lists of `size` items, the last one of what is left."""
    iterator = iter(items)
    while group := list(islice(iterator, size)):
        yield group


def tokenized(
    texts: Iterable[Any], config: FP8Config, model: ModelFacts, *, add_special_tokens: bool = True
) -> Iterator[Any]:
    """Batches of texts: tokenized, cut to `max_seq_length` or to what the model takes and, where a batch holds several,
    padded; or packed, with `concatenate_data`. Blank ones are left out.

    Args:
        texts: strings.
        config: says the tokenizer, and how many texts of what length.
        model: where a tokenizer is looked for, and how long texts may be.
        add_special_tokens: False for texts that a chat template has put them into.

    Raises:
        FP8CalibrationError: the model takes no text, there is no tokenizer, it cannot pad, or a text is none.
    """
    if not model.reads:
        raise FP8CalibrationError(
            f"the dataset is text, and the model takes {model.main_input!r}, not the input_ids of text: pass "
            f"{_DATA_FOR.get(model.main_input, '')}batches of {model.main_input!r}"
        )
    tokenizer = tokenizer_for(config, model)
    limit, why = _longest(tokenizer, config, model)
    cut = f"texts are cut to {limit} tokens, not to max_seq_length={config.max_seq_length}: {why}"
    if config.concatenate_data:
        if why:
            logger.warning(cut)
        return packed(_with_text(texts), tokenizer, limit, config, add_special_tokens)
    check_padding(tokenizer, config)
    options = {} if add_special_tokens else {"add_special_tokens": False}

    def generate() -> Iterator[Any]:
        said = why is None
        for group in groups(islice(_with_text(texts), config.most_samples), config.batch_size):
            padding = len(group) > 1
            batch = tokenizer(group, return_tensors="pt", truncation=True, max_length=limit, padding=padding, **options)
            if not said and batch["input_ids"].shape[1] == limit:
                logger.warning(cut)
                said = True
            yield batch

    return generate()


def _longest(tokenizer: Any, config: FP8Config, model: ModelFacts) -> tuple[int, str | None]:
    """How many tokens a text may have, and why these are fewer than `max_seq_length`, where they are."""
    limits: list[tuple[int, str | None]] = [(config.max_seq_length, None)]
    of_tokenizer = getattr(tokenizer, "model_max_length", None)
    if isinstance(of_tokenizer, int) and of_tokenizer > 0:
        limits.append((of_tokenizer, f"the tokenizer's model_max_length is {of_tokenizer}"))
    if model.max_tokens is not None:
        room = config.decode_steps if model.decodes and config.wants_attention else 0
        reason = f"the model takes {model.max_tokens}" + (f", and decode_steps={room} of them follow" if room else "")
        limits.append((max(model.max_tokens - room, 1), reason))
    return min(limits, key=lambda limit: limit[0])


def _with_text(texts: Iterable[Any]) -> Iterator[str]:
    for number, text in enumerate(texts):
        if not isinstance(text, str):
            raise FP8CalibrationError(f"sample {number} is {text!r}, not text: clean the column, or set text_column")
        if text.strip():
            yield text


def check_padding(tokenizer: Any, config: FP8Config) -> None:
    """Refuse several texts in a batch where the tokenizer cannot pad them."""
    if config.batch_size > 1 and getattr(tokenizer, "pad_token", None) is None:
        raise FP8CalibrationError(
            f"batch_size={config.batch_size} needs padding, but the tokenizer has no pad_token: set it, or use "
            "batch_size=1"
        )


def tokenizer_for(config: FP8Config, model: ModelFacts) -> Any:
    """The config's tokenizer, the one in its processor, or the one beside the model."""
    given = config.tokenizer
    if given is None and not hasattr(config.processor, "image_mean") and not hasattr(config.processor, "sampling_rate"):
        given = getattr(config.processor, "tokenizer", config.processor)  # a processor may be but a tokenizer
    return companion("tokenizer", given, model.origin)


def companion(kind: str, given: Any, origin: Origin) -> Any:
    """The tokenizer or processor: the one given, from the path given, or from where the model came from.

    Raises:
        FP8CalibrationError: there is none.
    """
    if given is not None and not isinstance(given, str):
        return given
    source = Origin(given, origin.access) if given else origin
    if not source.name_or_path:
        raise FP8CalibrationError(f"the dataset needs a {kind} and the model has no path to take it from: pass {kind}=")
    from transformers import AutoProcessor, AutoTokenizer

    try:
        made_by = AutoTokenizer if kind == "tokenizer" else AutoProcessor
        return made_by.from_pretrained(source.name_or_path, **source.arguments)
    except Exception as error:  # of many kinds: files that are missing or damaged, packages that are missing
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise FP8CalibrationError(f"no {kind} at {source} ({reason}): pass {kind}= in the config") from error


def collated(rows: Iterable[Mapping[str, Any]], config: FP8Config, model: ModelFacts) -> Iterator[dict[str, Any]]:
    """Batches of rows that hold model inputs: every column that the model's `forward` takes; others are left out.

    Raises:
        FP8CalibrationError: a column that the model takes has no numbers, or rows do not fit together.
    """
    keys: list[str] = []
    known: set[str] = set()
    for group in groups(islice(rows, config.most_samples), config.batch_size):
        if not keys:
            named = model.inputs is not None
            keys = [key for key, value in group[0].items() if model.takes(key) and (named or is_numeric(value))]
            say_left_out((key for key in group[0] if key not in keys), "are no inputs of the model")
            known.update(group[0])
        if later := {key for row in group for key in row} - known:
            say_left_out(later, "the first row does not have")
            known |= later
        yield {key: _stacked(key, [row.get(key) for row in group]) for key in keys}


def too_few(found: int, config: FP8Config, what: str = "samples") -> None:
    """Warn where the dataset has fewer samples than were asked for."""
    asked = config.says("num_calibration_samples") and config.num_calibration_samples != "auto"
    if asked and found < config.most_samples:
        logger.warning(
            "num_calibration_samples=%d, and the dataset has %d %s: all of them are used",
            config.most_samples,
            found,
            what,
        )


def counted(batches: Iterable[Any], config: FP8Config) -> Iterator[Any]:
    """The batches; at their end a warning if there were too few."""
    seen = 0
    for batch in batches:
        seen += batch_size_of(batch)
        yield batch
    if seen:
        too_few(seen, config)


def is_numeric(value: Any) -> bool:
    """Whether a tensor can be made of a value: a number, a tensor or array, or lists of numbers."""
    while isinstance(value, (list, tuple)) and value:
        value = value[0]
    return isinstance(value, (bool, int, float)) or hasattr(value, "dtype")


def say_left_out(columns: Iterable[str], why: str) -> None:
    """Warn of columns of the dataset that do not go into the model."""
    if listed := sorted(columns):
        logger.warning("columns of the dataset that %s are left out: %s", why, ", ".join(listed))


def _stacked(key: str, values: list[Any]) -> torch.Tensor:
    try:
        tensors = [torch.as_tensor(value) for value in values]
    except (TypeError, ValueError, RuntimeError) as error:
        raise FP8CalibrationError(
            f"column {key!r} is an input of the model and cannot be made a tensor ({error}): expected numbers in every "
            "row; correct or remove the column"
        ) from None
    if len({tensor.shape for tensor in tensors}) > 1:
        raise FP8CalibrationError(
            f"rows of different lengths ({key!r}) cannot be put into one batch: use batch_size=1, or a DataLoader that "
            "pads"
        )
    return torch.stack(tensors)


def batch_size_of(batch: Any) -> int:
    """How many samples a batch holds (1 if it cannot be told)."""
    values = list(batch.values()) if isinstance(batch, Mapping) else batch
    values = list(values) if isinstance(values, (list, tuple)) else [values]
    return next((len(value) for value in values if isinstance(value, torch.Tensor) and value.ndim > 0), 1)
