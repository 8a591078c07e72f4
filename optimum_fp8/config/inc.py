"""Intel Neural Compressor's side of the configuration: its older names, what of it has no counterpart, its files."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Mapping
from typing import Any

from ..errors import FP8ConfigError, FP8NotAvailableError, nearest

logger = logging.getLogger(__name__)

ALIASES = {"whitelist": "allowlist", "blacklist": "blocklist", "device_for_scales": "target"}
MODES_NOT_THERE = ("shape", "none")
OBSERVERS_NOT_THERE = ("shape",)
# Switches that have no counterpart (yet): off is how things are, on is an error.
_INTERVAL = "calibration_sample_interval"
_SWITCHES_NOT_THERE = (_INTERVAL,)
_OFF = ("false", "0", "none")
_SCALE_PARAMS = ("input_backoff", "weight_backoff")
_BY_INC = ("hp_dtype", "lp_dtype")  # INC puts them there itself
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
# Class names of INC's module table that stand for operations not covered (yet).
INC_TYPES_NOT_THERE = frozenset(
    [
        "BMM",
        "GaudiFP8Linear",
        "EmbeddingBag",
    ]
)


# Class names of INC's helper modules for the operations of attention, which lists of INC's switch on and off.
OPERATIONS = ("Matmul", "Softmax", "ModuleFusedSDPA", "KVCache")
# Of those that only models in vLLM-Gaudi's manner have, for the same operations on blocks of a cache.
OF_BLOCKS = ("B2BMatmul", "BlockSoftmaxConstMax", "VLLMKVCache")
HELPERS = (*OPERATIONS, *OF_BLOCKS)
_STORES = ("KVCache", "VLLMKVCache")  # the others compute attention
# What a file without an allowlist selects. Conv1D is transformers' Linear; BMM is a helper module that no model has.
_WITHOUT_ALLOWLIST = ["Linear", "Conv2d", "Conv1D"]


def in_our_words(options: dict[str, Any]) -> dict[str, Any]:
    """INC's older names, `scale_params` and switches that are off, said in keys of FP8Config.

    Raises:
        FP8ConfigError: two names of one key, or values of it that contradict each other.
        FP8NotAvailableError: a switch that has no counterpart is on.
    """
    options = _renamed(options)
    for key in _SWITCHES_NOT_THERE:
        if str(options.pop(key, None)).lower() not in _OFF:
            raise FP8NotAvailableError(f"{key} is not available in optimum_fp8 yet: remove it")
    params = options.pop("scale_params", None) or {}
    if not isinstance(params, dict):
        raise FP8ConfigError(f"scale_params={params!r} must be a dict with 'input_backoff' and 'weight_backoff'")
    for key, value in params.items():
        if key not in _SCALE_PARAMS:
            raise FP8ConfigError(f"unknown key {key!r} in scale_params: valid: {', '.join(_SCALE_PARAMS)}")
        if options.get(key) not in (None, value):
            raise FP8ConfigError(f"{key}={options[key]} contradicts scale_params[{key!r}]={value}: give one of them")
        options[key] = value
    return options


def _renamed(options: dict[str, Any]) -> dict[str, Any]:
    renamed: dict[str, Any] = {}
    for key, value in options.items():
        if key in ALIASES and value is None:
            continue
        if key in ALIASES and ALIASES[key] in options:
            raise FP8ConfigError(f"both {key!r} and {ALIASES[key]!r} are given, which are the same: keep one of them")
        renamed[ALIASES.get(key, key)] = value
    return renamed


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
    """FP8Config's keyword arguments that mean the same as the `options` of a file of INC's.

    Raises:
        FP8ConfigError: a key that neither INC nor FP8Config has.
    """
    known_keys = [*known_keys, *_SWITCHES_NOT_THERE]
    translated: dict[str, Any] = {}
    renamed = _renamed(options)
    renamed["allowlist"] = _in_full(renamed.get("allowlist"))
    _warn_of_what_inc_reads_otherwise(renamed)
    for key, value in renamed.items():
        if key in _RETIRED:
            logger.warning("%s is a retired key of INC and has no effect: remove it from the file", key)
        elif key == _INTERVAL:  # files that vLLM-Gaudi makes have it
            if str(value).lower() not in _OFF:
                logger.warning("%s has no effect: what is measured of a `dataset` is kept every few seconds", key)
        elif key in _BOOKKEEPING:
            continue
        elif key == "dump_stats_path" and value == "":
            logger.warning("dump_stats_path is empty: using the default")
        elif key == "allowlist":
            translated[key] = _without_types_not_there(value)
        elif key == "scale_params" and isinstance(value, dict):
            translated[key] = {param: value[param] for param in _SCALE_PARAMS if param in value}
        elif key in known_keys or key == "scale_params":
            translated[key] = value
        else:
            raise FP8ConfigError(f"unknown key {key!r}: {nearest(key, [*known_keys, *ALIASES])}")
    if str(translated.get("activation_scheme")).lower() != "weight_only":
        return {**asked_for(translated), **translated}
    return translated


def _warn_of_what_inc_reads_otherwise(options: Mapping[str, Any]) -> None:
    """Warn of settings that documentation of INC and vLLM still offers, and INC 3.10 does not read, or not as JSON."""
    params = options.get("scale_params")
    given = params if isinstance(params, Mapping) else {}
    if counting := [key for key in _SCALE_PARAMS if given.get(key) is not None]:
        logger.warning("scale_params: INC 3.10 ignores it; here it counts (%s)", ", ".join(counting))
    if unread := sorted(given.keys() - {*_SCALE_PARAMS, *_BY_INC}):
        logger.warning("scale_params: neither INC 3.10 nor optimum_fp8 reads %s", ", ".join(unread))
    texts = [key for key, value in options.items() if isinstance(value, str) and value.lower() in ("true", "false")]
    if texts:
        logger.warning(
            "%s: written as text (%r), and taken as if without quotation marks: write true or false",
            ", ".join(texts),
            options[texts[0]],
        )


def with_operations(options: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments with `attention` and `kv_cache` on where the types of the allowlist name what they do."""
    if not set(bare_types(options.get("allowlist"))).intersection(HELPERS):
        return options
    return {**{key: True for key, on in asked_for(options).items() if on}, **options}


def operations(options: Mapping[str, Any]) -> dict[str, tuple[bool, str]]:
    """Whether the lists of a file of INC's select each operation of attention, at least in some module, and why."""
    allow, blocked = options.get("allowlist"), bare_types(options.get("blocklist"))
    types, names = bare_types(allow), _entries(allow, "names")
    found: dict[str, tuple[bool, str]] = {}
    for kind in OPERATIONS:
        if kind in blocked:
            found[kind] = False, f"blocklist type {kind!r}"
        elif kind in types:
            found[kind] = True, f"allowlist type {kind!r}"
        elif names:
            found[kind] = True, "where an allowlist name matches"
        elif types:
            absent = types == _WITHOUT_ALLOWLIST
            found[kind] = False, "no allowlist: Linear, Conv2d and BMM" if absent else "not in allowlist"
        else:
            found[kind] = True, "empty allowlist: all that is supported"
    return found


def asked_for(options: Mapping[str, Any]) -> dict[str, bool]:
    """The keys that stand for the operations of attention, as far as lists select any.

    Those on blocks have to be named: where a list selects all that there is, the others tell.
    """
    named, blocked = bare_types(options.get("allowlist")), bare_types(options.get("blocklist"))
    on = {kind for kind, (selected, _) in operations(options).items() if selected}
    on |= {kind for kind in OF_BLOCKS if kind in named and kind not in blocked}
    return {"attention": bool(on.difference(_STORES)), "kv_cache": bool(on.intersection(_STORES))}


def bare_types(entries: Any) -> list[str]:
    """The types of a list, without `torch.nn.`."""
    return [str(kind).removeprefix("torch.nn.") for kind in _entries(entries, "types")]


def _entries(entries: Any, part: str) -> list[Any]:
    found = entries.get(part) if isinstance(entries, Mapping) else None
    return list(found) if isinstance(found, (list, tuple, set)) else []


def _in_full(allowlist: Any) -> Any:
    """A file's allowlist, with the types that INC adds where the file says none."""
    if allowlist is None:
        return {"names": [], "types": list(_WITHOUT_ALLOWLIST)}
    if not isinstance(allowlist, dict) or allowlist.get("types") is not None:
        return allowlist
    if allowlist.get("names"):
        logger.warning(
            "the allowlist has names and no types: as in INC, its default types (Linear, Conv2d, BMM) are selected as "
            'well; write "types": [] for the names alone'
        )
    return {**allowlist, "types": list(_WITHOUT_ALLOWLIST)}


def _without_types_not_there(allowlist: Any) -> Any:
    """Drop types that INC writes into every allowlist and that have no counterpart, as long as some type is left."""
    types = allowlist.get("types") if isinstance(allowlist, dict) else None
    if not types:
        return allowlist
    there = [kind for kind in types if str(kind).removeprefix("torch.nn.") not in INC_TYPES_NOT_THERE]
    if not there or len(there) == len(types):
        return allowlist
    logger.warning("allowlist types without a counterpart are left out: %s", sorted(set(types) - set(there)))
    return {**allowlist, "types": there}
