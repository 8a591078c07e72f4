"""Calibration data from a `datasets.Dataset`: text, images, or model inputs, as its columns say."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import chain, islice
from typing import Any

from ...config import FP8Config
from ...errors import FP8CalibrationError
from ..batching import collated, companion, groups, is_numeric, say_left_out, tokenized
from ..facts import ModelFacts
from ..source import Source, register_source


@register_source
class HFDataset(Source):
    """One split of the library `datasets`, in memory or streamed.

    Rows that hold model inputs already are collated, else text is tokenized and images go through the processor.
    """

    expected = "one split of a datasets.Dataset"

    def accepts(self, dataset: Any) -> bool:
        return type(dataset).__module__.split(".")[0] == "datasets"

    def check(self, dataset: Any) -> None:
        if isinstance(dataset, Mapping):
            raise FP8CalibrationError(f"the dataset is a dict of splits: pass one split of {sorted(dataset)}")

    def batches(self, dataset: Any, config: FP8Config, model: ModelFacts) -> Iterator[Any]:
        rows = iter(dataset)
        first = next(rows, None)
        if not isinstance(first, Mapping):
            raise FP8CalibrationError("the dataset is empty: pass a split that has rows")
        rows = chain([first], rows)
        if model.main_input in first:
            return collated(rows, config, model)
        text = config.text_column if isinstance(first.get(config.text_column, 0), str | None) else None
        image = next((key for key, value in first.items() if _is_image(value)), None)
        if text and image and model.takes("pixel_values"):
            text = text if model.takes("input_ids") else None
        elif text:
            image = None
        if text or image:
            inputs = (key for key in first if key not in (text, image) and key in (model.inputs or ()))
            say_left_out(inputs, "are inputs of the model, but neither its text nor its images,")
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


def _is_image(value: Any) -> bool:
    """Whether it looks like an image of Pillow, which need not be installed."""
    return hasattr(value, "convert") and hasattr(value, "size")


def _processed(
    rows: Iterable[Any], image: str, text: str | None, config: FP8Config, model: ModelFacts
) -> Iterator[Any]:
    processor = companion("processor", config.processor, model.origin)

    def generate() -> Iterator[Any]:
        for group in groups(rows, config.batch_size):
            inputs: dict[str, Any] = {"images": [row[image] for row in group]}
            if text:
                inputs |= {"text": [row[text] for row in group], "padding": len(group) > 1}
                if model.max_tokens is not None:  # not `max_seq_length`: images may stand in the text, as many tokens
                    inputs |= {"truncation": True, "max_length": model.max_tokens}
            yield processor(**inputs, return_tensors="pt")

    return generate()
