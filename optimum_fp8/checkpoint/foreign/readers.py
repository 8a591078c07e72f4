"""The registry of foreign formats, and what their readers have in common."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ...errors import FP8CheckpointError
from .headers import Files
from .layers import Cache, Found

Reader = Callable[[Mapping[str, Any], Files], Found]

READERS: dict[str, Reader] = {}

# Where tools put the calibrated scales of caches: below attention, or below the layers whose outputs are cached.
_CACHED = re.compile(r"(.+?)\.(?:([kv])_scale|[kv]_proj\.([kv])_scale|([kv])_proj\.output_scale)$")


def register_reader(*methods: str) -> Callable[[Reader], Reader]:
    """Make a reader known by the `quant_method` of the checkpoints that it reads.

    A reader is given what the configuration says of the quantization and the headers of the files; it returns what the
    layers are, and raises FP8CheckpointError for what it cannot read.
    """

    def register(reader: Reader) -> Reader:
        READERS.update(dict.fromkeys(methods, reader))
        return reader

    return register


def coded_modules(files: Files, leaf: str = "weight") -> list[str]:
    """The names of the modules whose `leaf` is FP8 codes in the files, in their order there."""
    end = f".{leaf}"
    return [key.removesuffix(end) for key, header in files.headers.items() if key.endswith(end) and header.is_fp8]


def keys_of(files: Files, name: str, names: Mapping[str, Iterable[str]]) -> dict[str, str]:
    """The tensors of a layer that are there, by our names.

    Args:
        files: the files.
        name: of the layer.
        names: what they may be called below the layer, by our names.
    """
    found: dict[str, str] = {}
    for ours, theirs in names.items():
        there = [f"{name}.{leaf}" for leaf in theirs if f"{name}.{leaf}" in files.headers]
        if len(there) > 1:
            raise FP8CheckpointError(f"{' and '.join(there)} are both in the files: expected one {ours} for {name}")
        if there:
            found[ours] = there[0]
    return found


def calibrated_caches(method: str, said: str, files: Files) -> dict[str, Cache]:
    """The attention modules with scales of cached keys and values in the files, by name.

    Args:
        method: the quant_method, for messages.
        said: the field of the configuration that says the cache is in FP8, for messages.
        files: the files.

    Raises:
        FP8CheckpointError: there are none, or some attention module lacks one.
    """
    keys: dict[str, dict[str, str]] = {}
    for key in files.headers:
        if match := _CACHED.match(key):
            kind = next(filter(None, match.groups()[1:]))
            keys.setdefault(match[1], {})[f"{kind}_scale"] = key
    # Attention in high precision may be that of a part without a cache, such as an encoder of images.
    end = ".k_proj"
    expected = {name.removesuffix(end) for name in coded_modules(files) if name.endswith(end)}
    missing = [
        f"{name}.{kind}_scale"
        for name in sorted({*keys, *expected})
        for kind in "kv"
        if f"{kind}_scale" not in keys.get(name, {})
    ]
    if missing or not keys:
        raise FP8CheckpointError(
            f"quant_method={method!r}: {said} says that the cache is in FP8, but the files lack "
            f"{', '.join(missing[:4]) or 'its scales'}{', …' if len(missing) > 4 else ''}: pass kv_cache=False to load "
            "the layers alone, or copy the checkpoint again"
        )
    return {name: Cache(each) for name, each in keys.items()}


def is_named(name: str, pattern: str) -> bool:
    """Whether a pattern of a configuration means a layer: its name, the end of it, a part of it, or a wildcard."""
    if "*" in pattern:
        regex = re.escape(pattern).replace(r"\*", ".*")
        return re.fullmatch(rf"(?:.*\.)?{regex}(?:\..*)?", name) is not None
    return f".{pattern}." in f".{name}."


def refuse_excluded(
    method: str,
    place: str,
    patterns: Iterable[str] | None,
    names: Iterable[str],
    means: Callable[[str, str], bool] = is_named,
) -> None:
    """Refuse layers in FP8 that the configuration says are not.

    Args:
        method: the quant_method, for messages.
        place: the field of the configuration, for messages.
        patterns: what it holds.
        names: of the layers in FP8.
        means: whether a layer, given first, is meant by a pattern.

    Raises:
        FP8CheckpointError: names the first and the pattern.
    """
    patterns = list(patterns or ())
    for name in names:
        if found := next((pattern for pattern in patterns if means(name, pattern)), None):
            raise FP8CheckpointError(
                f"quant_method={method!r}: {name} is in FP8 in the files, but {place!r} excludes it ({found!r}): one "
                "of them was edited; correct the configuration, or copy the checkpoint again"
            )
