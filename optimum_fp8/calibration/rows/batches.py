"""Batches of rows whose columns say what they hold: inputs of the model, text, conversations, images or audio."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

from ...config import FP8Config
from ...errors import FP8CalibrationError
from ..batching import companion, counted, is_numeric, say_left_out, too_few
from ..facts import ModelFacts
from .audio import Audio
from .columns import Chat, Row, find_chat, is_audio, is_image, is_messages, text_hint
from .multimodal import Multimodal
from .ways import Captions, Conversation, Images, Inputs, Text, Way

_IMAGE_NAMES = ("pixel_values", "image", "img", "images")
_AUDIO_NAMES = ("audio", "speech", "sound")
_SHOWN = 128  # rows that show what columns there are


@dataclass(frozen=True)
class Rows:
    """The samples of a dataset, with the same columns.

    Attributes:
        make: gives them, from the first one on.
        again: whether they may be read a second time, to look at them before anything long is started.
        images: columns that are known to hold images, even where a row has none.
        audio: those of audio.
        folder: that paths in them are relative to.
        name: how the dataset is called in messages.
    """

    make: Callable[[], Iterator[Row]]
    again: bool = True
    images: tuple[str, ...] = ()
    audio: tuple[str, ...] = ()
    folder: str = ""
    name: str = "the dataset"


def batches_of_rows(rows: Rows, config: FP8Config, model: ModelFacts) -> Iterator[Any]:
    """Model inputs are collated, else text is tokenized, conversations go through the chat template before that, and
    images and audio through the processor, as the model takes them.

    As many rows as may be used are looked at beforehand, where that takes nothing from a stream.

    Args:
        rows: the samples.
        config: says the text column, the tokenizer or processor, and how many samples make a batch.
        model: which inputs it takes.

    Raises:
        FP8CalibrationError: there are no rows, or some cannot be used.
    """
    iterator = rows.make()
    first = next(iterator, None)
    if first is None:
        raise FP8CalibrationError(f"{rows.name} is empty: expected at least one sample")
    way = _way(_with_all_columns(first, rows, config), rows, config, model)
    if config.concatenate_data and not isinstance(way, (Text, Conversation)):
        raise FP8CalibrationError(f"concatenate_data=True packs texts, and {rows.name} holds {way.name}: drop it")
    if way.used:
        say_left_out((key for key in first.values if key not in way.used), f"are not {way.name}")
    iterator = chain([first], iterator)
    if not rows.again:
        return counted(way.batches(iterator), config)
    usable = sum(map(way.check, islice(iterator, config.most_samples)))
    if not usable:
        raise FP8CalibrationError(f"{rows.name} is empty: expected at least one sample that is not blank")
    if config.concatenate_data:
        return counted(way.batches(rows.make()), config)
    if next(iterator, None) is None:
        too_few(usable, config)
    return way.batches(rows.make())


def _with_all_columns(first: Row, rows: Rows, config: FP8Config) -> Row:
    """The first row, with values from later ones in the columns where it has none: not each row need have an image."""
    values = dict(first.values)
    for row in _shown(rows, config) if rows.again else ():
        values |= {key: value for key, value in row.values.items() if values.get(key) is None and value is not None}
    return Row(first.where, values)


def _way(first: Row, rows: Rows, config: FP8Config, model: ModelFacts) -> Way:
    """What becomes of rows like this one."""
    values = first.values
    pictures = _holding(values, is_image, rows.images, config)
    sounds = _holding(values, is_audio, rows.audio, config)
    if model.main_input in values and model.main_input not in (*pictures, *sounds):
        return Inputs(config, model)
    text, chat = _language(first, (*pictures, *sounds), config, model)
    if (pictures and model.sees) or (sounds and model.hears):  # loaded once
        config = config.replace(processor=companion("processor", config.processor, model.origin))
    has_template = bool(getattr(config.processor, "chat_template", None))
    if pictures and model.sees:
        image = _one_of(pictures, "images", (model.main_input, *_IMAGE_NAMES))
        if not model.reads:
            return Images(image, rows.folder, config, model)
        if chat or has_template:
            return Multimodal(image, "image", text, chat, rows.folder, config, model)
        if text:
            return Captions(image, text, rows.folder, config, model)
        return Images(image, rows.folder, config, model)
    if sounds and model.hears:
        sound = _one_of(sounds, "audio", (model.main_input, *_AUDIO_NAMES))
        if model.reads and (chat or has_template):
            return Multimodal(sound, "audio", text, chat, rows.folder, config, model)
        return Audio(sound, rows.folder, config, model)
    if chat and model.reads and (model.sees or model.hears) and (kind := _kind_in(first, chat, rows, config)):
        return Multimodal(None, kind, None, chat, rows.folder, config, model)
    if text:
        return Text(text, config, model)
    if chat and model.reads:
        return Conversation(chat, config, model)
    if any(model.takes(key) and is_numeric(value) for key, value in values.items()):
        return Inputs(config, model)
    raise _nothing(first, pictures, sounds, chat, config, model)


def _holding(
    values: Mapping[str, Any], holds: Callable[[Any], bool], known: tuple[str, ...], config: FP8Config
) -> list[str]:
    """The columns of a kind; a path in the column of the text is text."""
    return [
        key
        for key, value in values.items()
        if key in known or (holds(value) and not (key == config.text_column and isinstance(value, str)))
    ]


def _language(
    first: Row, media: tuple[str, ...], config: FP8Config, model: ModelFacts
) -> tuple[str | None, Chat | None]:
    """The column of the text, or those of a conversation.

    Raises:
        FP8CalibrationError: text_column was set, and there is no such column.
    """
    values, column = first.values, config.text_column
    if not model.reads:  # a text alone is refused where it would be tokenized
        return (column if isinstance(values.get(column), str) and not media else None), None
    if column in values and column not in media:
        value = values[column]
        if isinstance(value, str | None):
            return column, None
        if is_messages(value) or value == []:
            return None, find_chat(values, config)
        raise FP8CalibrationError(
            f"{first.where}, column {column!r} is of type {type(value).__name__}, not text or a conversation: clean "
            "the column, or set text_column"
        )
    if column not in values and config.text_column != "text":
        raise FP8CalibrationError(
            f"{first.where} has the columns {sorted(values)}, and none is {column!r}: {text_hint(column, values)}"
        )
    return None, find_chat(values, config)


def _kind_in(first: Row, chat: Chat, rows: Rows, config: FP8Config) -> str:
    """What stands in the messages besides text; "" for nothing."""
    for row in _shown(rows, config) if rows.again else (first,):
        lists = [row.values.get(column) or () for column in chat.columns if chat.are_messages]
        for message in (each for messages in lists for each in messages if isinstance(each, Mapping)):
            content = message.get("content")
            for part in content if isinstance(content, (list, tuple)) else ():
                kind = str(part.get("type", "")).partition("_")[0] if isinstance(part, Mapping) else ""
                if kind in ("image", "audio"):
                    return kind
    return ""


def _shown(rows: Rows, config: FP8Config) -> Iterator[Row]:
    """The rows that show what the data hold."""
    return islice(rows.make(), min(_SHOWN, config.most_samples))


def _one_of(columns: list[str], kind: str, names: tuple[str, ...]) -> str:
    if len(columns) == 1:
        return columns[0]
    for name in names:
        if name in columns:
            return name
    raise FP8CalibrationError(
        f"the dataset has several columns of {kind}, {sorted(columns)}, and none has a name that says which of them "
        f"the model is to take: name it {names[-1] if kind == 'audio' else 'image'!r}, or remove the others"
    )


def _nothing(
    first: Row, pictures: list[str], sounds: list[str], chat: Chat | None, config: FP8Config, model: ModelFacts
) -> FP8CalibrationError:
    held = {"images": pictures, "audio": sounds, "a conversation": chat.columns if chat else ()}
    found = [f"{kind} in {columns[0]!r}" for kind, columns in held.items() if columns]
    if found:
        where = f"{first.where} has {' and '.join(found)}, which the model does not take"
    else:
        where = f"{first.where} has the columns {sorted(first.values)}"
    strings = [key for key, value in first.values.items() if isinstance(value, str) and key not in pictures + sounds]
    hint = f"inputs of the model such as {model.main_input!r}"
    if model.reads and not strings:
        hint = f"text in {config.text_column!r}, or {hint}"
    elif model.reads:
        hint = f"text in {config.text_column!r}: {text_hint(config.text_column, strings)}; or {hint}"
    return FP8CalibrationError(f"{where}: expected {hint}")
