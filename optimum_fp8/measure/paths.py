"""Where measurements are kept: the file of a `dump_stats_path`, and whether it can be written."""

from __future__ import annotations

import hashlib
import os
import re
import tempfile

from ..errors import FP8ConfigError

_FINGERPRINT = re.compile(r"[0-9a-f]{32}")


def measurements_path(prefix: str | os.PathLike[str]) -> str:
    """The file of a `dump_stats_path`: its folder, and its last part as the prefix of the file name."""
    return f"{os.fspath(prefix)}_measurements.safetensors"


def why_unwritable(folder: str | os.PathLike[str]) -> str | None:
    """Why nothing can be written into a folder, which need not be there yet; None if it can. Nothing is left there."""
    existing = os.path.abspath(folder)
    while not os.path.lexists(existing):
        existing = os.path.dirname(existing)
    if not os.path.isdir(existing):
        return f"{existing!r} is not a folder"
    try:
        with tempfile.TemporaryFile(dir=existing):
            return None
    except OSError as error:
        return f"nothing can be written to {existing!r} ({error.strerror or error})"


def check_dump_path(prefix: str | os.PathLike[str]) -> None:
    """Refuse a `dump_stats_path` that measurements cannot be written to, before there are any.

    Raises:
        FP8ConfigError: the message says why.
    """
    path = measurements_path(prefix)
    reason = f"{path!r} is a folder" if os.path.isdir(path) else why_unwritable(os.path.dirname(path) or ".")
    if reason is not None:
        raise FP8ConfigError(
            f"dump_stats_path={os.fspath(prefix)!r} cannot take the measurements: {reason}; expected a folder that can "
            "be written to, and the beginning of a file name in it"
        )


def kept_prefix(prefix: str | os.PathLike[str], fingerprint: str) -> str:
    """The prefix under which the file of the model with `fingerprint` is kept when another takes its place."""
    known = fingerprint if _FINGERPRINT.fullmatch(fingerprint) else hashlib.sha256(fingerprint.encode()).hexdigest()
    return f"{os.fspath(prefix)}-{known[:12]}"


def file_digest(path: str) -> str:
    """32 hex digits for what a file holds."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:32]
