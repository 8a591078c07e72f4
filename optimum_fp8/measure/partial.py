"""Files with the measurements of a part of the data: where they are, and when they have served their turn.

What was measured so far is worth keeping until all that was measured has been used: until the model is converted or
its measurements are written and, where a checkpoint is to be made in one go, until that is written.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar

_ENDING = ".safetensors"
_kept: ContextVar[list[str] | None] = ContextVar("kept", default=None)


def partial_path(prefix: str | os.PathLike[str], run: int = 0) -> str:
    """The file of a `dump_stats_path` for a calibration under way, the first of a model or one that goes on with it."""
    return f"{os.fspath(prefix)}_partial{f'_{run + 1}' if run else ''}{_ENDING}"


def kept_partial_path(path: str, fingerprint: str) -> str:
    """Where the partial file at `path` is kept when that of another model takes its place."""
    return f"{path.removesuffix(_ENDING)}-{fingerprint[:12]}{_ENDING}"


def discard(paths: Iterable[str]) -> None:
    """Remove partial files whose measurements have been used; inside `kept_until_saved`, at its end."""
    waiting = _kept.get()
    if waiting is not None:
        waiting.extend(paths)
        return
    for path in paths:
        with suppress(OSError):  # a file that stays is found out of date, at worst
            os.unlink(path)


@contextmanager
def kept_until_saved() -> Iterator[None]:
    """Keep partial files until what is made of them has been saved too, which the code inside does; an error keeps
    them."""
    paths: list[str] = []
    token = _kept.set(paths)
    try:
        yield
    finally:
        _kept.reset(token)
    discard(paths)
