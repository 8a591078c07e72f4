"""The ways from rows to batches: model inputs, text, conversations, images."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

from ...config import FP8Config
from ...errors import FP8CalibrationError
from ..batching import collated, companion, groups, tokenized, tokenizer_for
from ..facts import ModelFacts
from .chat import Template, media_in, messages_of, tools_of
from .columns import Chat, Row
from .images import check_image, images_in, wants_colors


class Way(ABC):
    """What becomes of rows whose columns hold one kind of thing.

    Attributes:
        used: the columns that go into the model.
        name: what they are, for messages.
    """

    used: tuple[str, ...]
    name: str

    @abstractmethod
    def check(self, row: Row) -> bool:
        """Whether a row is a sample; False leaves it out.

        Raises:
            FP8CalibrationError: it cannot be used.
        """

    @abstractmethod
    def batches(self, rows: Iterable[Row]) -> Iterator[Any]:
        """Batches of rows, which have not been checked; tokenizers and the like have been."""


class Inputs(Way):
    """Columns that are inputs of the model."""

    used = ()  # `collated` chooses them, and says which it leaves out
    name = "inputs of the model"

    def __init__(self, config: FP8Config, model: ModelFacts):
        self.config, self.model = config, model

    def check(self, row: Row) -> bool:
        return True

    def batches(self, rows: Iterable[Row]) -> Iterator[Any]:
        return collated((row.values for row in rows), self.config, self.model)


class Text(Way):
    """A column of text."""

    name = "the text"

    def __init__(self, column: str, config: FP8Config, model: ModelFacts):
        self.used, self.column, self.config, self.model = (column,), column, config, model

    def check(self, row: Row) -> bool:
        return bool(self._text(row).strip())

    def batches(self, rows: Iterable[Row]) -> Iterator[Any]:
        return tokenized(map(self._text, rows), self.config, self.model)

    def _text(self, row: Row) -> str:
        return text_in(row, self.column)


class Conversation(Way):
    """Columns of a conversation, through the chat template of the tokenizer."""

    name = "the conversation"

    def __init__(self, chat: Chat, config: FP8Config, model: ModelFacts):
        self.chat, self.config, self.model = chat, config, model
        self.used = (*chat.columns, *chat.beside)
        tokenizer = tokenizer_for(config, model)
        known = model.inputs is not None and (model.sees or model.hears)
        if known and not getattr(tokenizer, "chat_template", None):  # it may be the processor's
            tokenizer = companion("processor", config.processor, model.origin)
        self.template = Template(tokenizer, chat.columns[0])

    def check(self, row: Row) -> bool:
        return bool(self._text(row).strip())

    def batches(self, rows: Iterable[Row]) -> Iterator[Any]:
        return tokenized(map(self._text, rows), self.config, self.model, add_special_tokens=False)

    def _text(self, row: Row) -> str:
        messages = messages_of(row, self.chat)
        if any(media_in(messages, kind, row.where) for kind in ("image", "audio", "video")):
            raise FP8CalibrationError(
                f"{row.where}, column {self.chat.columns[0]!r} holds more than text, and the model takes "
                f"{self.model.main_input!r} only: expected messages of text"
            )
        return self.template.text(messages, tools_of(row, self.chat), row.where) if messages else ""


class Images(Way):
    """A column of images, for a model that only sees."""

    name = "the image"

    def __init__(self, column: str, folder: str, config: FP8Config, model: ModelFacts):
        self.column, self.folder, self.config = column, folder, config
        self.used = (column,)
        self.processor = companion("processor", config.processor, model.origin)
        self.colors = wants_colors(self.processor)

    def check(self, row: Row) -> bool:
        check_image(row, self.column, self.folder)
        return True

    def batches(self, rows: Iterable[Row]) -> Iterator[Any]:
        for group in groups(islice(rows, self.config.most_samples), self.config.batch_size):
            images = [image for row in group for image in images_in(row, self.column, self.colors, self.folder)]
            yield processed(self.processor, group, self.column, {"images": images})


class Captions(Images):
    """Images with a text each, as processors without places for images in their texts take them."""

    name = "the text or the image"

    def __init__(self, column: str, text: str, folder: str, config: FP8Config, model: ModelFacts):
        super().__init__(column, folder, config, model)
        self.text, self.used = text, (text, column)
        # Not `max_seq_length`: images may stand in the text, as many tokens.
        limit = {} if model.max_tokens is None else {"truncation": True, "max_length": model.max_tokens}
        self.options: dict[str, Any] = limit

    def check(self, row: Row) -> bool:
        text_in(row, self.text)
        return super().check(row)

    def batches(self, rows: Iterable[Row]) -> Iterator[Any]:
        for group in groups(islice(rows, self.config.most_samples), self.config.batch_size):
            images = [image for row in group for image in images_in(row, self.column, self.colors, self.folder)]
            inputs = {"images": images, "padding": len(group) > 1, **self.options}
            yield self._with_places(group, inputs)

    def _with_places(self, group: list[Row], inputs: dict[str, Any]) -> Any:
        """What the processor makes of texts, with a place for the image before each where it puts none there itself."""
        texts = [text_in(row, self.text) for row in group]
        token, number = (getattr(self.processor, name, None) for name in ("image_token", "image_token_id"))
        needs_places = isinstance(token, str) and number is not None and not any(token in text for text in texts)
        try:
            batch = processed(self.processor, group, self.column, {"text": texts, **inputs})
            if not needs_places or bool((batch["input_ids"] == number).any()):
                return batch
        except FP8CalibrationError:
            if not needs_places:
                raise
        texts = [f"{token}{text}" for text in texts]
        return processed(self.processor, group, self.column, {"text": texts, **inputs})


def processed(processor: Any, group: list[Row], column: str, inputs: dict[str, Any]) -> Any:
    """What a processor makes of a group of rows.

    Raises:
        FP8CalibrationError: it cannot take them.
    """
    try:
        return processor(**inputs, return_tensors="pt")
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        images = [image for each in inputs.get("images", ()) for image in (each if isinstance(each, list) else [each])]
        kinds = sorted({f"{each.mode} {each.size}" for each in images if hasattr(each, "mode")})
        raise FP8CalibrationError(
            f"{span(group)}: {type(processor).__name__} cannot take what is in column {column!r} "
            f"({', '.join(kinds)}): {error}"
        ) from error


def span(group: list[Row]) -> str:
    """Where the rows of a batch stand."""
    first, last = group[0].where, group[-1].where
    return first if first == last else f"{first} to {last}"


def text_in(row: Row, column: str) -> str:
    """The text of a row.

    Raises:
        FP8CalibrationError: it has none.
    """
    value = row.values.get(column)
    if not isinstance(value, str):
        raise FP8CalibrationError(
            f"{row.where}, column {column!r} is {value!r}, not text: clean the column, or set text_column"
        )
    return value
