"""Conversations about images or audio, through the chat template of a processor and the processor itself."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

from ...config import FP8Config
from ...errors import FP8CalibrationError
from ..batching import check_padding, companion, groups
from ..facts import ModelFacts
from .audio import decoded
from .chat import Template, media_in, messages_of, tools_of, with_media
from .columns import Chat, Row
from .images import image_of, source_of, wants_colors
from .ways import Way, processed, text_in


class Multimodal(Way):
    """Images or audio with a conversation, or with a text that becomes what the user says.

    Args:
        medium: the column of images or audio; None where they stand in the messages.
        kind: "image" or "audio".
        text: the column of the text, where there is no conversation; None for neither.
        chat: the columns of the conversation.
        folder: that paths are relative to.
        config: says the processor.
        model: where it is looked for otherwise.
    """

    def __init__(
        self,
        medium: str | None,
        kind: str,
        text: str | None,
        chat: Chat | None,
        folder: str,
        config: FP8Config,
        model: ModelFacts,
    ):
        self.medium, self.kind, self.text, self.chat = medium, kind, text, chat
        self.folder, self.config = folder, config
        columns = (medium, text, *(chat.columns + chat.beside if chat else ()))
        self.used = tuple(filter(None, columns))
        self.name = f"the text or the {kind}" if text else f"the conversation or the {kind}"
        self.processor = companion("processor", config.processor, model.origin)
        self.column = medium or (chat.columns[0] if chat else "")
        self.template = Template(self.processor, chat.columns[0] if chat else self.column)
        self.colors = wants_colors(self.processor)
        self.rate = getattr(getattr(self.processor, "feature_extractor", None), "sampling_rate", None)
        check_padding(getattr(self.processor, "tokenizer", None), config)

    def check(self, row: Row) -> bool:
        found = self._conversation(row)
        where = f"{row.where}, column {self.column!r}"
        for value in found[1] if found else ():
            if self.kind == "image":
                source_of(value, where, self.folder)
            elif isinstance(value, Mapping) and "array" in value:
                self._sound(value, where)
        return found is not None

    def batches(self, rows: Iterable[Row]) -> Iterator[Any]:
        samples = filter(None, map(self._sample, rows))
        for group in groups(islice(samples, self.config.most_samples), self.config.batch_size):
            media = [medium for _, _, media in group for medium in media]
            inputs: dict[str, Any] = {"text": [text for _, text, _ in group], "padding": len(group) > 1}
            if bos := getattr(getattr(self.processor, "tokenizer", None), "bos_token", None):
                inputs |= {"add_special_tokens": False} if group[0][1].startswith(bos) else {}
            if media and self.kind == "image":
                inputs["images"] = [media for _, _, media in group]
            elif media:
                inputs |= {"audio": media, "sampling_rate": self.rate}
            yield processed(self.processor, [row for row, _, _ in group], self.column, inputs)

    def _sample(self, row: Row) -> tuple[Row, str, list[Any]] | None:
        """A row with its text and its images or audio."""
        found = self._conversation(row)
        if found is None:
            return None
        text, values = found
        where = f"{row.where}, column {self.column!r}"
        if self.kind == "image":
            return row, text, [image_of(value, where, self.colors, self.folder) for value in values]
        return row, text, [self._sound(value, where) for value in values]

    def _sound(self, value: Any, where: str) -> Any:
        sound = decoded(value, where, self.folder, self.rate)
        if sound.rate != self.rate:
            raise FP8CalibrationError(
                f"{where} has a sampling rate of {sound.rate} Hz, and the processor takes {self.rate}: resample it"
            )
        return sound.array

    def _conversation(self, row: Row) -> tuple[str, list[Any]] | None:
        """The text as the processor reads it, and what stands in it; None for an empty conversation."""
        messages = messages_of(row, self.chat) if self.chat else [{"role": "user", "content": self._said(row)}]
        if not messages:
            return None
        where = f"{row.where}, column {self.column!r}"
        values = media_in(messages, self.kind, where)
        for other in {"image", "audio", "video"} - {self.kind}:
            if media_in(messages, other, where):
                raise FP8CalibrationError(f"{where} has {other} beside {self.kind}: expected one kind in all messages")
        if not values and self.medium:
            value = row.values.get(self.medium)
            values = list(value) if isinstance(value, (list, tuple)) else [value]
            if value is None and self.chat:  # a conversation may do without
                values = []
            elif any(each is None for each in values):
                raise FP8CalibrationError(f"{where} is None, not {self.kind}: leave such rows out, or correct them")
        messages = with_media(messages, len(values), where, self.kind)
        tools = tools_of(row, self.chat) if self.chat else None
        return self.template.text(messages, tools, row.where), values

    def _said(self, row: Row) -> str:
        return text_in(row, self.text) if self.text else ""
