"""One thing that is wrong with a checkpoint, or looks wrong."""

from __future__ import annotations

from dataclasses import dataclass

ERROR, WARNING = "error", "warning"


@dataclass(frozen=True)
class Finding:
    """What is wrong, and where.

    Attributes:
        severity: "error": the checkpoint loads as something else than what was saved, or not at all; "warning": it may
            be meant.
        where: the tensor, the file or the key.
        found: what is there.
        expected: what should be.
        action: what to do about it.
    """

    severity: str
    where: str
    found: str
    expected: str
    action: str

    def __str__(self) -> str:
        return f"{self.severity}: {self.where}: found {self.found}, expected {self.expected}; {self.action}"


def error(where: str, found: str, expected: str, action: str) -> Finding:
    return Finding(ERROR, where, found, expected, action)


def warning(where: str, found: str, expected: str, action: str) -> Finding:
    return Finding(WARNING, where, found, expected, action)
