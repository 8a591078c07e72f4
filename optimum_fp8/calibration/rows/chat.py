"""Conversations of calibration data: brought to the form of chat templates, and rendered by one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ...errors import FP8CalibrationError
from .columns import Chat, Row, is_messages

# Who says something, as ShareGPT has it.
_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "chatgpt": "assistant", "observation": "tool"}


def messages_of(row: Row, chat: Chat) -> list[dict[str, Any]]:
    """The messages of a row: `role` and `content`, and what else each has; none for an empty conversation.

    Raises:
        FP8CalibrationError: the row holds something else.
    """
    found: list[dict[str, Any]] = []
    if chat.are_messages:
        for column in chat.columns:
            value = row.values.get(column)
            if isinstance(value, Mapping) and is_messages(value):
                value = [dict(zip(value, message, strict=True)) for message in zip(*value.values(), strict=True)]
            if not isinstance(value, (list, tuple)):
                raise FP8CalibrationError(
                    f"{row.where}, column {column!r} is {value!r}, not a list of messages: correct or remove the row"
                )
            found += [_message(each, f"{row.where}, column {column!r}, message {n}") for n, each in enumerate(value)]
    else:
        asked, *context, answered = (
            _text(row, column, optional=column in chat.columns[1:-1]) for column in chat.columns
        )
        question = "\n\n".join(part for part in (asked, *context) if part)
        found = [{"role": "user", "content": question}, {"role": "assistant", "content": answered}]
    system = next((row.values[name] for name in chat.beside if name != "tools" and row.values.get(name)), None)
    if found and isinstance(system, str) and found[0]["role"] != "system":
        found.insert(0, {"role": "system", "content": system})
    return found


def tools_of(row: Row, chat: Chat) -> list[Any] | None:
    """What the assistant may call, as a chat template takes it: a list of schemas."""
    tools = row.values.get("tools") if "tools" in chat.beside else None
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except json.JSONDecodeError as error:
            raise FP8CalibrationError(f"{row.where}, column 'tools' is not JSON: {error}") from None
    return list(map(_without_none, tools)) if tools else None


class Template:
    """The chat template of a tokenizer or processor.

    Args:
        owner: which of them.
        column: of the conversations, for messages.

    Raises:
        FP8CalibrationError: there is none.
    """

    def __init__(self, owner: Any, column: str):
        self.owner, self.column = owner, column
        self.in_parts: bool | None = None  # whether it takes the content of a message as a list of parts
        if not getattr(owner, "chat_template", None):
            raise FP8CalibrationError(
                f"column {column!r} holds conversations, and {type(owner).__name__} has no chat template: pass a "
                "tokenizer that has one, set its chat_template, or set text_column to a column of text"
            )

    def text(self, messages: list[dict[str, Any]], tools: list[Any] | None, where: str) -> str:
        """What the model reads of a conversation; what is in it already is no special token to be added again.

        Raises:
            FP8CalibrationError: the template cannot take the conversation.
        """
        messages = [{**message, "content": _joined(message["content"])} for message in messages]
        if any(isinstance(message["content"], list) for message in messages):
            return self._rendered(_in_parts(messages), tools, where)
        if self.in_parts is None:
            said = next((m["content"].strip() for m in messages if m["role"] == "user" and m["content"].strip()), "")
            plain = self._tried(messages, tools)
            self.in_parts = plain is None or said not in plain
            if self.in_parts and said not in (self._tried(_in_parts(messages), tools) or ""):
                self.in_parts = None  # neither shows it
                return self._rendered(messages, tools, where)
        return self._rendered(_in_parts(messages) if self.in_parts else messages, tools, where)

    def _tried(self, messages: list[dict[str, Any]], tools: list[Any] | None) -> str | None:
        try:
            return self._rendered(messages, tools, "")
        except FP8CalibrationError:
            return None

    def _rendered(self, messages: list[dict[str, Any]], tools: list[Any] | None, where: str) -> str:
        try:
            return self.owner.apply_chat_template(messages, tools=tools, tokenize=False)
        except Exception as error:  # of many kinds: a template is a program
            raise FP8CalibrationError(
                f"{where}, column {self.column!r}: the chat template cannot take the conversation "
                f"({type(error).__name__}: {error}); its roles are {[message['role'] for message in messages]}"
            ) from error


def with_media(messages: list[dict[str, Any]], images: int, where: str, kind: str = "image") -> list[dict[str, Any]]:
    """The messages as lists of parts, with a part for each image (or sound) of the row.

    They stand where the messages have parts of the kind, or say "<image>", else at the beginning of what the user says.

    Raises:
        FP8CalibrationError: the messages have parts for another number of them.
    """
    messages = _in_parts(messages)
    parts = [part for message in messages for part in message["content"]]
    placed = sum(part["type"] == kind for part in parts)
    mark = f"<{kind}>"
    marks = sum(part.get("text", "").count(mark) for part in parts)
    if not placed and marks:
        messages = [{**message, "content": _at_marks(message["content"], mark, kind)} for message in messages]
        placed = marks
    if not placed and images:
        user = next((message for message in messages if message["role"] == "user"), messages[0])
        user["content"] = [*({"type": kind} for _ in range(images)), *user["content"]]
        placed = images
    if placed != images:
        raise FP8CalibrationError(
            f"{where} holds {images} of kind {kind!r}, and the messages have {placed} places for them: expected as many"
        )
    return messages


def media_in(messages: list[dict[str, Any]], kind: str, where: str) -> list[Any]:
    """The images (or sounds) that stand in the messages themselves, in their order.

    Raises:
        FP8CalibrationError: one is an address on the network.
    """
    found = []
    for message in messages:
        for part in message["content"] if isinstance(message["content"], list) else ():
            value = next((part[key] for key in (kind, "path", "url") if part.get(key) is not None), None)
            if part.get("type") != kind or value is None:
                continue
            if isinstance(value, str) and "://" in value:
                raise FP8CalibrationError(f"{where} has the {kind} {value!r}: expected a local file, or what is in it")
            found.append(value)
    return found


def _joined(content: str | list[dict[str, Any]]) -> str | list[dict[str, Any]]:
    """Parts that are all text as one text."""
    if isinstance(content, str) or any(part["type"] != "text" for part in content):
        return content
    return "\n".join(str(part.get("text", "")) for part in content)


def _at_marks(parts: list[dict[str, Any]], mark: str, kind: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for part in parts:
        if part["type"] != "text":
            found.append(part)
            continue
        for number, text in enumerate(part["text"].split(mark)):
            found += [{"type": kind}] if number else []
            found += [{"type": "text", "text": text.strip()}] if text.strip() else []
    return found


def _in_parts(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages with lists of parts as their contents."""
    return [
        {**each, "content": [{"type": "text", "text": each["content"]}] if each["content"] else []}
        if isinstance(each["content"], str)
        else {**each}
        for each in messages
    ]


def _message(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise FP8CalibrationError(f"{where} is {value!r}: expected a dict with 'role' and 'content'")
    message = _without_none(value)
    role = message.pop("from", None) or message.get("role")
    content = message.pop("value", None) if "value" in message else message.get("content")
    if not isinstance(role, str):
        raise FP8CalibrationError(f"{where} does not say whose it is, only {sorted(value)}: expected 'role' or 'from'")
    if content is None and "content" not in value and "value" not in value and "tool_calls" not in message:
        raise FP8CalibrationError(f"{where} says nothing, it has only {sorted(value)}: expected 'content' or 'value'")
    if content is not None and not isinstance(content, (str, list)):
        raise FP8CalibrationError(f"{where} is {content!r}: expected a string, or a list of parts")
    if isinstance(content, list):
        content = [_part(part, where) for part in content]
    return {**message, "role": _ROLES.get(role, role), "content": "" if content is None else content}


def _part(part: Any, where: str) -> dict[str, Any]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    if not isinstance(part, dict) or "type" not in part:
        raise FP8CalibrationError(f"{where} has the part {part!r}: expected a dict with 'type'")
    if part["type"] == "image_url":  # OpenAI's
        address = part.get("image_url")
        return {"type": "image", "image": address.get("url") if isinstance(address, Mapping) else address}
    return part


def _without_none(value: Any) -> Any:
    """What a row really has: the library `datasets` gives all messages the keys of each."""
    if isinstance(value, Mapping):
        return {key: _without_none(each) for key, each in value.items() if each is not None}
    return list(map(_without_none, value)) if isinstance(value, (list, tuple)) else value


def _text(row: Row, column: str, optional: bool) -> str:
    value = row.values.get(column)
    if value is None and optional:
        return ""
    if not isinstance(value, str):
        raise FP8CalibrationError(f"{row.where}, column {column!r} is {value!r}, not text: correct or remove the row")
    return value
