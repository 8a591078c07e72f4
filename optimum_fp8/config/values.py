"""The kinds of values that keys of FP8Config take: how each is checked, documented, and said on a command line.

The table of keys is read at every start of `optimum-cli`, so nothing here imports torch before a value is checked.
"""

from __future__ import annotations

import copy
import json
import os
import re
from argparse import ArgumentTypeError, BooleanOptionalAction
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..errors import FP8ConfigError, FP8NotAvailableError, nearest
from .inc import HELPERS, INC_TYPES_NOT_THERE, OBSERVERS_NOT_THERE

_HP_ALIASES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}


@dataclass(frozen=True)
class Values:
    """A kind of values.

    Attributes:
        check: `check(where, value)` gives the canonical form of `value`, or raises an FP8ConfigError that names
            `where`, what was found and what is valid.
        text: the valid values in words.
        flag: argparse's arguments for a flag that takes such a value.
        plain: the JSON-able form of a canonical value.
    """

    check: Callable[[str, Any], Any]
    text: str
    flag: Mapping[str, Any] = field(default_factory=dict)
    plain: Callable[[Any], Any] = copy.deepcopy


def choice(*choices: str, not_there: Collection[str] = ()) -> Values:
    """One of `choices`, in any case; `not_there` are values of INC that have no counterpart."""
    by_lower = {name.lower(): name for name in choices}

    def check(where: str, value: Any) -> str:
        text = str(value).lower()
        if text in by_lower:
            return by_lower[text]
        if text in not_there:
            raise FP8NotAvailableError(f"{where}={value!r} is not available in optimum_fp8 yet: use {choices[0]!r}")
        raise FP8ConfigError(f"{where}={value!r} is not valid: {nearest(str(value), choices)}")

    return Values(check, ", ".join(f'"{name}"' for name in choices), {"metavar": "NAME"})


def _observer(where: str, value: Any) -> str:
    from ..measure import OBSERVERS

    return choice(*OBSERVERS, not_there=OBSERVERS_NOT_THERE).check(where, value)


def _boolean(where: str, value: Any) -> bool:
    if isinstance(value, bool):
        return value
    if str(value).lower() in ("true", "false"):
        return str(value).lower() == "true"
    raise FP8ConfigError(f"{where}={value!r} is not valid: expected True or False")


def _count(where: str, value: Any) -> int:
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return value
    raise FP8ConfigError(f"{where}={value!r} is not valid: expected a whole number above 0")


def _optional_count(where: str, value: Any) -> int | None:
    return None if value is None else _count(where, value)


def _count_or_auto(where: str, value: Any) -> int | str:
    if isinstance(value, str) and value.lower() == "auto":
        return "auto"
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return value
    raise FP8ConfigError(f"{where}={value!r} is not valid: expected a whole number above 0, or 'auto'")


def _count_or_auto_argument(text: str) -> int | str:
    try:
        return int(text)
    except ValueError:
        return text


def _percent(where: str, value: Any) -> float:
    if isinstance(value, (int, float)) and not isinstance(value, bool) and 0.0 < value <= 100.0:
        return float(value)
    raise FP8ConfigError(f"{where}={value!r} is not valid: expected 0 < {where} <= 100")


def _whole(where: str, value: Any) -> int:
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    raise FP8ConfigError(f"{where}={value!r} is not valid: expected a whole number, 0 or above")


def check_backoff(where: str, value: Any) -> float:
    """A part of the full scale: a float above 0 and at most 1."""
    if isinstance(value, (int, float)) and not isinstance(value, bool) and 0.0 < value <= 1.0:
        return float(value)
    raise FP8ConfigError(f"{where}={value!r} is not valid: expected 0 < {where} <= 1")


def _backoff(where: str, value: Any) -> float | None:
    return None if value is None else check_backoff(where, value)


def _hp_dtype(where: str, value: Any) -> str:
    name = str(value).removeprefix("torch.").lower()
    return choice("bf16", "fp16", "fp32").check(where, _HP_ALIASES.get(name, name))


def _path_prefix(where: str, value: Any) -> str:
    path = os.fspath(value) if isinstance(value, (str, os.PathLike)) else ""
    if not os.path.basename(path):
        raise FP8ConfigError(
            f"{where}={value!r} is not valid: expected a folder and a file prefix, as './stats/measure'"
        )
    return path


def _optional_text(where: str, value: Any) -> str | None:
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    return None if value is None else _text(where, value)


def _text(where: str, value: Any) -> str:
    if isinstance(value, str) and value:
        return value
    raise FP8ConfigError(f"{where}={value!r} is not valid: expected a non-empty string")


def _live(where: str, value: Any) -> Any:
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if not isinstance(value, (int, float, bytes)):
        return value
    raise FP8ConfigError(f"{where} of type {type(value).__name__} is not valid: expected a {where} or its path")


def _dataset(where: str, value: Any) -> Any:
    """Anything that may hold samples: which of them can be used, the sources of calibration data say."""
    import torch

    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if not isinstance(value, (int, float, complex, bytes, torch.Tensor)):
        return value
    raise FP8ConfigError(
        f"{where} of type {type(value).__name__} is not valid: expected a list of samples, a path, the name of a "
        "dataset on the Hub, a dataset, a data frame, a DataLoader, an iterable of batches, or a callable"
    )


def is_plain(value: Any) -> bool:
    """Whether the value of a live key is text, which is serialized, and no object."""
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(item, str) for item in value))


def _names(where: str, value: Any) -> list[str] | None:
    if value is None:
        return None
    if isinstance(value, (list, tuple)) and all(isinstance(name, str) and name for name in value):
        for name in value:
            check_regex(where, name)
        return list(value)
    raise FP8ConfigError(f"{where}={value!r} is not valid: expected a list of module names")


def check_regex(where: str, name: Any) -> None:
    """Raise an FP8ConfigError unless `name` is a regular expression."""
    try:
        re.compile(name)
    except (re.error, TypeError) as error:
        raise FP8ConfigError(f"{where} holds {name!r}, not a regular expression: {error}") from None


def type_name(where: str, kind: Any) -> str:
    """A class as its full path; a class name as it is."""
    if isinstance(kind, type):
        return f"{kind.__module__}.{kind.__qualname__}"
    if isinstance(kind, str) and kind:
        return kind
    raise FP8ConfigError(f"{where} holds {kind!r}: expected classes or class names")


def _module_list(where: str, value: Any) -> dict[str, list[str]]:
    """{"names": [...], "types": [...]} with names that compile as regular expressions and types as strings."""
    value = {} if value is None else value
    if not isinstance(value, Mapping):
        raise FP8ConfigError(f"{where}={value!r} is not valid: expected {{'names': [...], 'types': [...]}}")
    for part in value:
        if part not in ("names", "types"):
            raise FP8ConfigError(f"unknown key {part!r} in {where}: {nearest(str(part), ('names', 'types'))}")
    names, types = (_as_list(f"{where}[{part!r}]", value.get(part)) for part in ("names", "types"))
    for name in names:
        check_regex(f"{where}['names']", name)
    return {"names": names, "types": [type_name(f"{where}['types']", kind) for kind in types]}


def _allowlist(where: str, value: Any) -> dict[str, list[str]]:
    checked = _module_list(where, value)
    for kind in checked["types"]:
        if kind.removeprefix("torch.nn.") in INC_TYPES_NOT_THERE:
            raise FP8NotAvailableError(
                f"{where} type {kind!r} is not available in optimum_fp8 yet: use Linear, Conv2d, and for attention "
                f"{', '.join(HELPERS)}"
            )
    return checked


def _as_list(where: str, value: Any) -> list[Any]:
    if value is None:
        return []
    if isinstance(value, (list, tuple, set)):
        return list(value)
    raise FP8ConfigError(f"{where}={value!r} is not valid: expected a list")


def json_argument(text: str) -> Any:
    """A JSON value from a command line."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ArgumentTypeError(f"{text!r} is not JSON: {error}") from None


OBSERVER = Values(
    _observer,
    '"maxabs", "maxabs_per_channel", "percentile", "mse", "entropy", "moving_average", "save", or one registered',
    {"metavar": "NAME"},
)
BOOLEAN = Values(_boolean, "bool", {"action": BooleanOptionalAction})
COUNT = Values(_count, "int > 0", {"type": int, "metavar": "INT"})
OPTIONAL_COUNT = Values(_optional_count, "int > 0, None", COUNT.flag)
WHOLE = Values(_whole, "int >= 0", {"type": int, "metavar": "INT"})
BACKOFF = Values(_backoff, "0 < number <= 1, None", {"type": float, "metavar": "FLOAT"})
HP_DTYPE = Values(_hp_dtype, '"bf16", "fp16", "fp32", a torch dtype', {"metavar": "NAME"})
PATH_PREFIX = Values(_path_prefix, "folder and file prefix", {"metavar": "PATH"})
CLASS_NAME = Values(_optional_text, "name of a class, None", {"metavar": "NAME"})
COUNT_OR_AUTO = Values(_count_or_auto, 'int > 0, "auto"', {"type": _count_or_auto_argument, "metavar": "INT"})
PERCENT = Values(_percent, "0 < number <= 100", {"type": float, "metavar": "FLOAT"})
OPTIONAL_TEXT = Values(_optional_text, "string, None", {"metavar": "TEXT"})
TEXT = Values(_text, "string", {"metavar": "TEXT"})
NAMES = Values(_names, "list of names, None", {"nargs": "+", "metavar": "NAME"})
MODULE_LIST = Values(
    _module_list,
    '{"names": [regex], "types": [class or name]}, None',
    {"type": json_argument, "metavar": "JSON"},
)
ALLOWLIST = Values(_allowlist, MODULE_LIST.text, MODULE_LIST.flag)


def live(check: Callable[[str, Any], Any], text: str) -> Values:
    """An object that is shared by copies of the config and only serialized where it is text."""
    return Values(check, text, {"metavar": "PATH"}, lambda value: copy.copy(value) if is_plain(value) else None)


DATASET = live(_dataset, "samples, path, name on the Hub, dataset, data frame, loader, iterable, callable")
TOKENIZER = live(_live, "tokenizer or path, None")
PROCESSOR = live(_live, "processor or path, None")
