"""What the columns of a row hold, as the values of the first one show: images, audio, conversations, text."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from ...config import FP8Config
from ...errors import FP8CalibrationError, nearest

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
AUDIO_SUFFIXES = (".wav", ".flac", ".mp3", ".ogg", ".opus", ".m4a", ".aac", ".aiff", ".aif")

_MESSAGES = ("messages", "conversations", "conversation", "dialogue", "dialog", "chat", "chosen")
_ASKED = ("prompt", "instruction", "question", "query", "problem", "input")
_ANSWERED = ("completion", "response", "output", "answer", "solution", "chosen")
_SYSTEM = ("system", "system_prompt")


class Row(NamedTuple):
    """A sample: where it stands, for messages, and what its columns hold."""

    where: str
    values: Mapping[str, Any]


class Chat(NamedTuple):
    """The columns that hold a conversation.

    Attributes:
        columns: of messages, one behind the other; or of what the user says, its context if any, and the answer.
        are_messages: which of both.
        beside: columns of a system prompt and of tools, where there are any.
    """

    columns: tuple[str, ...]
    are_messages: bool
    beside: tuple[str, ...] = ()


def is_image(value: Any) -> bool:
    """Whether it looks like an image of Pillow, which need not be installed, like several, or is the path of one."""
    if isinstance(value, (list, tuple)):
        return bool(value) and all(map(is_image, value))
    return (hasattr(value, "convert") and hasattr(value, "size")) or _is_path(value, IMAGE_SUFFIXES)


def is_audio(value: Any) -> bool:
    """Whether it is audio as the library `datasets` has it, decoded or with a decoder, or the path of a file."""
    if isinstance(value, Mapping):
        return "array" in value and "sampling_rate" in value
    return hasattr(value, "get_all_samples") or _is_path(value, AUDIO_SUFFIXES)


def is_messages(value: Any) -> bool:
    """Whether it is a list of messages, each with who says it and what, or a dict of lists, as in `datasets`."""
    if isinstance(value, Mapping):
        return any(isinstance(value.get(key), (list, tuple)) for key in ("role", "from"))
    if not isinstance(value, (list, tuple)) or not value:
        return False
    return all(isinstance(each, Mapping) and ("role" in each or "from" in each) for each in value)


def is_sample(value: Any) -> bool:
    """Whether it is one sample by itself, or holds one, and no tensor or array: no batch."""
    if not isinstance(value, Mapping):
        return isinstance(value, str) or is_image(value) or is_messages(value)
    if is_audio(value):
        return True
    has_arrays = any(hasattr(each, "shape") for each in value.values())
    return not has_arrays and any(
        isinstance(each, str)
        or is_image(each)
        or is_audio(each)
        or is_messages(each)
        or (each == [] and key in _MESSAGES)
        for key, each in value.items()
    )


def as_values(sample: Any, config: FP8Config) -> Mapping[str, Any] | None:
    """The columns of a sample that may stand by itself; None if it is no sample."""
    if isinstance(sample, os.PathLike):
        sample = os.fspath(sample)
    if is_audio(sample):
        return {"audio": sample}
    if isinstance(sample, Mapping):
        return sample
    if is_image(sample):
        return {"image": sample}
    if is_messages(sample):
        return {"messages": sample}
    return {config.text_column: sample} if isinstance(sample, str) else None


def find_chat(values: Mapping[str, Any], config: FP8Config) -> Chat | None:
    """The columns that hold a conversation; None where there is none.

    Raises:
        FP8CalibrationError: there are several, and none has a usual name.
    """
    beside = tuple(name for name in (*_SYSTEM, "tools") if values.get(name))
    listed = [name for name, value in values.items() if is_messages(value)]
    listed += [name for name in _MESSAGES if name not in listed and values.get(name, 0) in ([], None)]
    named = [name for name in (config.text_column, *_MESSAGES) if name in listed]
    if "prompt" in listed and config.text_column not in listed:
        answers = [name for name in _ANSWERED if name in listed]
        return Chat(("prompt", *answers[:1]), True, beside)
    if named or len(listed) == 1:
        return Chat(tuple((named or listed)[:1]), True, beside)
    if listed:
        raise FP8CalibrationError(
            f"the dataset has several columns of messages, {sorted(listed)}: set text_column to one of them"
        )
    asked, answered = ([name for name in names if isinstance(values.get(name), str)] for names in (_ASKED, _ANSWERED))
    if not asked or not answered:
        return None
    context = [name for name in ("input", "context") if asked[0] == "instruction" and name in values]
    return Chat((asked[0], *context[:1], answered[0]), False, beside)


def text_hint(column: str, names: Iterable[str]) -> str:
    """What to do where the column of the text is not there."""
    return f"set text_column ({nearest(column, sorted(names))})"


def _is_path(value: Any, suffixes: tuple[str, ...]) -> bool:
    if not isinstance(value, (str, os.PathLike)):
        return False
    path = os.fspath(value)
    return isinstance(path, str) and len(path) < 4096 and path.lower().endswith(suffixes) and "\n" not in path
