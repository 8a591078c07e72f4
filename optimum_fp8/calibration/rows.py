"""Batches of rows whose columns say what they hold: inputs of the model, text, images, or images with text."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from itertools import chain, islice
from typing import Any

from ..config import FP8Config
from ..errors import FP8CalibrationError
from .batching import collated, companion, groups, is_numeric, say_left_out, tokenized
from .facts import ModelFacts

_IMAGE_NAMES = ("pixel_values", "image", "img")
_DEEP_MODES = ("I", "F")  # more than 8 bits a channel: Pillow cuts off what is above 255


def batches_of_rows(
    rows: Iterable[Mapping[str, Any]], config: FP8Config, model: ModelFacts, images: Collection[str] = ()
) -> Iterator[Any]:
    """Model inputs are collated, else text is tokenized and images go through the processor.

    Args:
        rows: the samples, with the same columns.
        config: says the text column, the tokenizer or processor, and how many samples make a batch.
        model: which inputs it takes.
        images: columns that are known to hold images, even where a row has none.

    Raises:
        FP8CalibrationError: there are no rows, or none of their columns can be used.
    """
    rows = iter(rows)
    first = next(rows, None)
    if not isinstance(first, Mapping):
        raise FP8CalibrationError("the dataset is empty: pass a split that has rows")
    rows = chain([first], rows)
    pictures = [key for key, value in first.items() if is_image(value) or (value is None and key in images)]
    if model.main_input in first and model.main_input not in pictures:
        return collated(rows, config, model)
    text = config.text_column if isinstance(first.get(config.text_column, 0), str | None) else None
    if text in pictures:
        text = None
    if text and pictures and model.takes("pixel_values"):
        text = text if model.takes("input_ids") else None
    elif text:
        pictures = []
    image = _image_column(pictures, model) if pictures else None
    if text or image:
        say_left_out((key for key in first if key not in (text, image)), _why(text, image))
    if image:
        return _processed(islice(rows, config.num_calibration_samples), image, text, config, model)
    if text:
        return tokenized((row[text] for row in rows), config, model)
    if any(model.takes(key) and is_numeric(value) for key, value in first.items()):
        return collated(rows, config, model)
    raise FP8CalibrationError(
        f"the dataset has columns {sorted(first)}: expected text in {config.text_column!r} (set text_column), "
        f"images, or inputs of the model such as {model.main_input!r}"
    )


def is_image(value: Any) -> bool:
    """Whether it looks like an image of Pillow, which need not be installed."""
    return hasattr(value, "convert") and hasattr(value, "size")


def _image_column(columns: list[str], model: ModelFacts) -> str:
    if len(columns) == 1:
        return columns[0]
    for name in (model.main_input, *_IMAGE_NAMES):
        if name in columns:
            return name
    raise FP8CalibrationError(
        f"the dataset has several columns of images, {sorted(columns)}, and none has a name that says which of them "
        f"the model is to see: name it 'image', or remove the others"
    )


def _why(text: str | None, image: str | None) -> str:
    """Why the other columns do not go into the model."""
    return f"are not {' or '.join(f'the {kind}' for kind, key in (('text', text), ('image', image)) if key)}"


def _processed(
    rows: Iterable[Mapping[str, Any]], image: str, text: str | None, config: FP8Config, model: ModelFacts
) -> Iterator[Any]:
    processor = companion("processor", config.processor, model.origin)
    colors = _wants_colors(processor)

    def generate() -> Iterator[Any]:
        seen = 0
        for group in groups(rows, config.batch_size):
            images = [_image(row.get(image), number, image, colors) for number, row in enumerate(group, seen)]
            inputs: dict[str, Any] = {"images": images}
            if text:
                texts = [_caption(row.get(text), number, text) for number, row in enumerate(group, seen)]
                inputs |= {"text": texts, "padding": len(group) > 1}
                if model.max_tokens is not None:  # not `max_seq_length`: images may stand in the text, as many tokens
                    inputs |= {"truncation": True, "max_length": model.max_tokens}
            try:
                batch = processor(**inputs, return_tensors="pt")
            except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
                kinds = sorted({f"{each.mode} {each.size}" for each in images if hasattr(each, "mode")})
                raise FP8CalibrationError(
                    f"samples {seen} to {seen + len(group) - 1}: {type(processor).__name__} cannot take the images in "
                    f"column {image!r} ({', '.join(kinds)}): {error}"
                ) from error
            seen += len(group)
            yield batch

    return generate()


def _wants_colors(processor: Any) -> bool:
    """Whether a processor normalizes three channels, and so cannot take images of another number."""
    processor = getattr(processor, "image_processor", processor)
    mean = getattr(processor, "image_mean", None)
    return bool(getattr(processor, "do_normalize", False)) and isinstance(mean, (list, tuple)) and len(mean) == 3


def _image(value: Any, number: int, column: str, colors: bool) -> Any:
    where = f"sample {number}, column {column!r}"
    if not is_image(value):
        found = "None" if value is None else f"of type {type(value).__name__}"
        raise FP8CalibrationError(f"{where} is {found}, not an image: leave such rows out, or correct them")
    mode = getattr(value, "mode", "RGB")
    if not colors or mode == "RGB":
        return value
    if mode.startswith(_DEEP_MODES):
        raise FP8CalibrationError(
            f"{where} is an image of mode {mode!r} and the processor takes 8 bits in each of 3 channels: scale and "
            "convert it to 'RGB'"
        )
    try:
        return value.convert("RGB")
    except ValueError as error:
        raise FP8CalibrationError(f"{where} is an image of mode {mode!r}: convert it to 'RGB' ({error})") from None


def _caption(value: Any, number: int, column: str) -> str:
    if not isinstance(value, str):
        raise FP8CalibrationError(
            f"sample {number}, column {column!r} is {value!r}, not text: correct or remove the row"
        )
    return value
