"""Reading the JSON configuration files of Intel Neural Compressor as people have them."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable
from typing import Any

from .config_values import INC_KEYS_NOT_THERE, INC_TYPES_NOT_THERE
from .errors import FP8ConfigError, nearest

logger = logging.getLogger(__name__)

_ALIASES = {"whitelist": "allowlist", "blacklist": "blocklist", "device_for_scales": "target"}
_RETIRED = ("method", "quantize_weight", "dump_stats_xlsx_path")
# INC's own bookkeeping, and switches about its files and devices, which have no counterpart here.
_BOOKKEEPING = [
    "_json_file",
    "non_tunable_params",
    "white_list",
    "mod_dict",
    "world_size",
    "local_rank",
    "global_rank",
    "device_type",
    "shape_file",
    "measure_on_hpu",
    "recalc_scales",
    "seperate_measure_files",
    "int_dtype",
]


def read_json(json_file: str | os.PathLike[str]) -> dict[str, Any]:
    """The JSON object in a file, or an FP8ConfigError that says what is wrong with the file."""
    try:
        with open(json_file, encoding="utf-8") as file:
            options = json.load(file)
    except OSError as error:
        raise FP8ConfigError(f"cannot read the configuration {os.fspath(json_file)!r}: {error.strerror}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise FP8ConfigError(f"{os.fspath(json_file)!r} is not JSON: {error}") from None
    if not isinstance(options, dict):
        raise FP8ConfigError(f"{os.fspath(json_file)!r} must hold a JSON object, found {type(options).__name__}")
    return options


def translate(options: dict[str, Any], known_keys: Iterable[str]) -> dict[str, Any]:
    """FP8Config's keyword arguments that mean the same as INC's `options`.

    Raises:
        FP8ConfigError: a key that neither INC nor FP8Config has.
    """
    known_keys = list(known_keys)
    translated: dict[str, Any] = {}
    for key, value in options.items():
        if key in _ALIASES and _ALIASES[key] in options:
            raise FP8ConfigError(f"both {key!r} and {_ALIASES[key]!r} are given, which are the same: keep one of them")
        key = _ALIASES.get(key, key)
        if key in _RETIRED:
            logger.warning("%s is a retired key of INC and has no effect: remove it from the file", key)
        elif key in _BOOKKEEPING or key == "target" and value is None:
            continue
        elif key == "dump_stats_path" and value == "":
            logger.warning("dump_stats_path is empty: using the default")
        elif key in ("allowlist", "blocklist"):
            translated[key] = _module_list(key, value)
        elif key == "scale_params" and isinstance(value, dict):
            translated[key] = {k: v for k, v in value.items() if k in ("input_backoff", "weight_backoff")}
        elif key in known_keys or key == "scale_params" or key in INC_KEYS_NOT_THERE:
            translated[key] = value
        else:
            raise FP8ConfigError(f"unknown key {key!r}: {nearest(key, [*known_keys, *_ALIASES])}")
    return translated


def _module_list(key: str, value: Any) -> Any:
    """Drop types that INC writes into every allowlist and that have no counterpart, as long as some type is left."""
    types = value.get("types") if isinstance(value, dict) else None
    if key != "allowlist" or not types:
        return value
    there = [kind for kind in types if str(kind).removeprefix("torch.nn.") not in INC_TYPES_NOT_THERE]
    if there and len(there) < len(types):
        logger.warning(
            "allowlist types without a counterpart are left out (for attention and caches set attention=True, "
            "kv_cache=True): %s",
            sorted(set(types) - set(there)),
        )
        return {**value, "types": there}
    return value
