"""The one exception family: every error says where, what was found, what was expected, and what to do next."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class FP8Error(Exception):
    """Base of every error raised by `optimum_fp8`."""


class FP8ConfigError(FP8Error, ValueError):
    """A configuration key, value or combination that cannot be right."""


class FP8SelectionError(FP8Error, ValueError):
    """A pattern that matches no module, or a selection that leaves nothing to quantize."""


class FP8ScaleError(FP8Error, ValueError):
    """A range or a scale that is zero, negative, NaN, infinite or not set."""


class FP8OperandError(FP8Error, RuntimeError):
    """Tensors that an operator cannot take, or not with one another: by their dtypes or shapes."""


class FP8MeasurementError(FP8Error, RuntimeError):
    """Measurements that are missing, incomplete, or of another model."""


class FP8StateError(FP8Error, RuntimeError):
    """A step that does not fit the state the model is in (converting twice, for example)."""


class FP8CheckpointError(FP8Error, RuntimeError):
    """A checkpoint that cannot be loaded or saved soundly."""


class FP8CalibrationError(FP8Error, ValueError):
    """Calibration data that cannot be used."""


class FP8NotAvailableError(FP8Error, NotImplementedError):
    """Something that `optimum_fp8` does not offer (yet)."""


_SHOWN = 40


def nearest(word: str, choices: Iterable[str], *, closest: int | None = None) -> str:
    """A hint for messages: the valid choice that looks most like `word`, then all of them, up to a limit.

    With `closest` only so many follow, those that look most like `word` first.
    """
    choices = [str(choice) for choice in choices]
    if closest is not None and len(choices) > closest:
        shown = difflib.get_close_matches(word, sorted(choices), n=closest, cutoff=0.0)
        return f"{nearest(word, shown)}, …"
    close = difflib.get_close_matches(str(word).lower(), [choice.lower() for choice in choices], n=1, cutoff=0.5)
    by_lower = {choice.lower(): choice for choice in choices}
    hint = f"did you mean {by_lower[close[0]]!r}? " if close else ""
    return f"{hint}valid: {', '.join(choices[:_SHOWN])}{', …' if len(choices) > _SHOWN else ''}"
