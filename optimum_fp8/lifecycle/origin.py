"""Origin: where a model was loaded from, so that its tokenizer and processor can be taken from the same place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

_OF_THE_PLACE = ("code_revision", "revision", "subfolder")


@dataclass(frozen=True)
class Origin:
    """Where `from_pretrained` loaded a model from, and how.

    Attributes:
        name_or_path: a folder or the name of a repository; "" for a model that has none.
        arguments: what else was said to `from_pretrained`: revision, subfolder, token, cache_dir and the like.
    """

    name_or_path: str = ""
    arguments: Mapping[str, Any] = field(default_factory=dict)

    @property
    def access(self) -> dict[str, Any]:
        """The arguments that hold for any place: those without revision and subfolder, which are of this one."""
        return {name: value for name, value in self.arguments.items() if name not in _OF_THE_PLACE}

    def __str__(self) -> str:
        place = [f"{name}={self.arguments[name]!r}" for name in _OF_THE_PLACE if self.arguments.get(name)]
        return ", ".join([repr(self.name_or_path), *place])
