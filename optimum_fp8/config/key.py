"""Key: what is said of one key of FP8Config, beside its name and its type."""

from __future__ import annotations

from typing import Any

from .values import Values


class Key:
    """One key: an attribute of the config that brings what is assigned to it to one form, or refuses it.

    Attributes:
        default: the value as a user would write it.
        values: the kind of values.
        text: what the key means, in one sentence without its full stop.
        origin: whose key it is: "INC", "HF" or "ours".
        see: where the documentation says more, as a link.
        of_module: whether modules may differ in it, so that it may stand in `overrides`.
        live: whether its object is shared by copies of the config and not serialized.
        has_flag: whether it can be said on a command line.
        of_data: whether it only says which data are taken, or where results go: what the same batches measure does not
            depend on it.
    """

    name: str

    def __init__(
        self,
        default: Any,
        values: Values,
        text: str,
        origin: str,
        *,
        see: str = "",
        of_module: bool = False,
        live: bool = False,
        has_flag: bool = True,
        of_data: bool = False,
    ):
        self.default, self.values, self.text, self.origin, self.see = default, values, text, origin, see
        self.of_module, self.live, self.has_flag, self.of_data = of_module, live, has_flag, of_data

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, config: Any, owner: type | None = None) -> Any:
        return self if config is None else config.__dict__[self.name]

    def __set__(self, config: Any, value: Any) -> None:
        config.__dict__[self.name] = self.normalize(value)

    def normalize(self, value: Any) -> Any:
        """The canonical form of `value`, or an FP8ConfigError that says what is valid."""
        return self.values.check(self.name, value)

    @property
    def flag(self) -> str:
        """The key as a flag: `--scale-method`."""
        return f"--{self.name.replace('_', '-')}"


def key(*args: Any, **options: Any) -> Any:
    """A `Key` where the annotation beside it says what reading the attribute gives."""
    return Key(*args, **options)
