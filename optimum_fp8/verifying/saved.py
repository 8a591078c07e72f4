"""Whether a checkpoint of ours is as it was saved: digests, configuration, and what loading it without data says."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from typing import Any

import transformers

from ..checkpoint.digests import DIGESTS, SAVE, differences
from ..checkpoint.model_config import MODEL, changed_keys
from ..errors import FP8Error
from ..files.skeleton import known_class
from ..files.source import Source
from .finding import Finding, error, warning
from .formats import OURS
from .opened import COPY, Opened

_BACK = "put it back, or quantize the original model again"
_KEPT = "the record stays where tensors are copied with their metadata: save the model again with this version"


def check_saved(opened: Opened) -> tuple[list[Finding], bool]:
    """What is not as it was saved, and whether all tensors are known to be."""
    found = list(_check_records(opened))
    wrong = differences(opened.files, opened.records, None)
    known = any(record.get(SAVE) for record in opened.records.values())
    found += [error(_short(name), what, "what was saved", COPY) for name, what in wrong]
    found += _check_configs(opened)
    return found, known and not wrong


def _short(name: str) -> str:
    return os.path.basename(name) if os.path.isabs(name) else name


def _check_records(opened: Opened) -> Iterator[Finding]:
    for path in opened.files if opened.method == OURS else ():
        name, record = os.path.basename(path), opened.records.get(path)
        if record is None and not any(name in each.where for each in opened.findings):
            found = "no record of what was saved"
            yield warning(f"{name}: metadata {OURS!r}", found, "one: flipped bits cannot be told", _KEPT)
        elif record is not None and not record.get(DIGESTS):
            found = "a record without digests"
            yield warning(f"{name}: metadata {OURS!r}", found, "one of each tensor, as newer versions write", _KEPT)


def _check_configs(opened: Opened) -> Iterator[Finding]:
    """The keys of both configurations against what the files of weights say of them."""
    seen, missing = set(), object()
    for record in opened.records.values():
        for key, (found, saved) in changed_keys(opened.config, record.get(MODEL) or {}).items():
            if key not in seen:
                yield error(f"config.json: {key}", repr(found), repr(saved), _BACK)
            seen.add(key)
        told: Mapping[str, Any] = record.get("config") or {}
        others = sorted({*told, *opened.quantization}) if opened.method == OURS or opened.quantization else []
        for key in others if told else ():
            there, was = opened.quantization.get(key, missing), told.get(key, missing)
            if there != was and f"quantization {key}" not in seen:
                where = f"quantization_config: {key}"
                yield error(where, repr(opened.quantization.get(key)), repr(told.get(key)), _BACK)
                seen.add(f"quantization {key}")
        if told and not opened.quantization:
            return


def check_loading(opened: Opened) -> Iterator[Finding]:
    """What loading says of names and shapes, for models that transformers knows; no data is read."""
    if opened.method != OURS or not opened.config:
        return
    model_class = known_class(Source(opened.folder, opened.files, {}, opened.config))
    if model_class is None:
        return
    level = logging.getLogger("transformers").level
    logging.getLogger("transformers").setLevel(logging.ERROR)
    try:
        _, said = model_class.from_pretrained(opened.folder, device_map="meta", output_loading_info=True)
    except FP8Error as failure:
        yield error(opened.folder, f"loading refuses it: {failure}", "a checkpoint that loads", _BACK)
        return
    except Exception as failure:
        found = f"transformers {transformers.__version__} cannot load it: {type(failure).__name__}: {failure}"
        yield error(opened.folder, found[:600], "a checkpoint that loads", _BACK)
        return
    finally:
        logging.getLogger("transformers").setLevel(level)
    for name in sorted(said["missing_keys"]):
        yield error(name, "nothing", f"a tensor of {model_class.__name__}, which would be given at random", COPY)
    for name in sorted(said["unexpected_keys"]):
        yield error(name, f"a tensor that {model_class.__name__} does not have", "none", COPY)
