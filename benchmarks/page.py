"""The page of a run, which grows: it is written anew after each part, so that no later one can take anything away."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path

from . import table
from .failures import reason

Measured = tuple[list[table.Row], list[str]]  # rows, and what to know about them


class Page:
    """What has been measured so far, on disk.

    Attributes:
        failed: names of the parts that raised.
    """

    def __init__(self, path: Path, title: str, described: Mapping[str, str]):
        self.path, self.title, self.described = path, title, dict(described)
        self.rows: list[table.Row] = []
        self.notes: list[str] = []
        self.failed: list[str] = []

    def run(self, parts: Mapping[str, Callable[[], Measured]], after: Callable[[], Mapping[str, str]] = dict) -> None:
        """Run parts one after the other; of one that raises, the error is a row, and the others go on.

        Args:
            parts: by name.
            after: what else to tell of the machine after each part.
        """
        left = list(parts)
        taken: list[str] = []
        for name, part in parts.items():
            self.described["parts"] = _progress(taken, left)
            self.write()
            start = time.perf_counter()
            rows, notes = self._measured(name, part)
            left.remove(name)
            taken.append(f"{name} {time.perf_counter() - start:.0f} s")
            print(taken[-1], flush=True)
            self.rows, self.notes = self.rows + rows, self.notes + notes
            self.described.update(after(), parts=_progress(taken, left))
            self.write()

    def _measured(self, name: str, part: Callable[[], Measured]) -> Measured:
        try:
            return part()
        except Exception as error:
            traceback.print_exc()
            self.failed.append(name)
            return [table.not_run(f"part {name}", reason(error))], []

    def write(self) -> None:
        table.write(self.path, table.markdown(self.rows, self.described, self.title, self.notes))

    def __str__(self) -> str:
        return table.report(self.rows, self.described, self.notes)


def _progress(taken: list[str], left: list[str]) -> str:
    """ "linear 90 s, casts 20 s; not finished: conv"."""
    return ", ".join(taken) + ("; " if taken and left else "") + (f"not finished: {', '.join(left)}" if left else "")
