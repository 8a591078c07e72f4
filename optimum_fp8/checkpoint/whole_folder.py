"""Folders that are whole or not there: written beside their place, and moved to it by a change of name.

A process may end at any moment, and the disk may be full: neither damages what is there already.
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

from safetensors import SafetensorError

from ..errors import FP8CheckpointError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FORBIDDEN = (errno.EROFS, errno.EACCES, errno.EPERM)
_NUMBER = "(os error "  # how errors of the system end that safetensors passes on


@contextmanager
def whole_folder(folder: str | os.PathLike[str], *, replace_empty: bool = False) -> Iterator[str]:
    """A folder to write to, beside the place of `folder`, that is moved there at the end: it is whole or not there.

    Raises:
        FP8CheckpointError: something is there; with `replace_empty` an empty folder may be. Or the disk is full, or
            nothing may be written there.
    """
    target = os.path.abspath(folder)
    if os.path.exists(target) and not (replace_empty and os.path.isdir(target) and not os.listdir(target)):
        raise FP8CheckpointError(f"{target} exists: choose another folder")
    with explained(target):
        os.makedirs(os.path.dirname(target), exist_ok=True)
        temporary = tempfile.mkdtemp(dir=os.path.dirname(target), prefix=".fp8-")
        try:
            yield temporary
            os.chmod(temporary, 0o755)
            os.replace(temporary, target)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def put_in_place(folder: str, target: str) -> None:
    """Move a finished folder to `target`, on the same disk; what is there is taken aside first, and removed at last."""
    if not os.path.lexists(target):
        os.replace(folder, target)
        return
    aside = tempfile.mkdtemp(dir=os.path.dirname(os.path.abspath(target)), prefix=".fp8-replaced-")
    os.replace(target, os.path.join(aside, os.path.basename(target)))
    os.replace(folder, target)
    shutil.rmtree(aside)


@contextmanager
def explained(target: str, left: str = "nothing of it is left") -> Iterator[None]:
    """Say what to do where a disk is full, or nothing may be written to it; other errors pass.

    Args:
        target: what was to be written.
        left: what there is of it after the error.

    Raises:
        FP8CheckpointError: in place of the error of the system.
    """
    try:
        yield
    except (OSError, SafetensorError, FP8CheckpointError) as error:
        cause = error.__cause__ if isinstance(error, FP8CheckpointError) else error  # explained for a folder inside
        number = cause.errno if isinstance(cause, OSError) else _number(cause)
        if number not in (*_FULL, *_FORBIDDEN):
            raise
        advice = "free some space, or choose a folder on another disk"
        if number in _FORBIDDEN:
            advice = "choose a folder that can be written to"
        raise FP8CheckpointError(f"{target} could not be written ({cause}): {left}; {advice}") from cause


def _number(error: BaseException | None) -> int | None:
    """The number of an error of the system that safetensors passes on, or None for any other."""
    if not isinstance(error, SafetensorError):
        return None
    digits = str(error).partition(_NUMBER)[2].partition(")")[0]
    return int(digits) if digits.isdigit() else None
