"""How a command ends: its text on the standard output, or one line that says what is wrong."""

from __future__ import annotations

import os
import sys
from argparse import Namespace
from collections.abc import Callable, Iterable

from ..errors import FP8ConfigError, FP8Error, FP8MeasurementError
from ..lifecycle import are_there
from ..measure import Measurements, check_dump_path, files_of_inc, measurements_path

_ENDING = "_measurements.safetensors"


def outcome(step: Callable[[Namespace], str], args: Namespace, left: str = "nothing was written") -> int:
    """Run a command; 0 when it has done its work, 1 for an error that a message explains, 130 when interrupted.

    Args:
        step: does the work, and returns what is printed.
        args: its arguments.
        left: what is there after an interruption.
    """
    try:
        print(step(args))
        return 0
    except (FP8Error, OSError, ValueError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"interrupted: {left}", file=sys.stderr)
        return 130


def loaded(path: str) -> Measurements:
    """The measurements that an argument names: as the prefix they were written with, their file, or INC's files.

    Raises:
        FP8MeasurementError: there are none, or they cannot be read.
    """
    prefix = path.removesuffix(_ENDING)
    if not (are_there(prefix) or files_of_inc(prefix) or os.path.exists(prefix)):
        raise FP8MeasurementError(
            f"no measurements at {path}: expected what was --output of `optimum-cli fp8 measure`, the file that it "
            "wrote, or files of INC's"
        )
    return Measurements.load(prefix)


def check_prefix(prefix: str, overwrite: bool) -> None:
    """Refuse an `--output` of measurements that cannot be written, or that is taken.

    Raises:
        FP8ConfigError: the message says which file it is about.
    """
    check_dump_path(prefix)
    refuse_taken([measurements_path(prefix)], overwrite)


def refuse_taken(paths: Iterable[str], overwrite: bool) -> None:
    """Refuse to write where files are, unless they are to be replaced.

    Raises:
        FP8ConfigError: names one of them.
    """
    taken = [path for path in paths if os.path.lexists(path)]
    if taken and not overwrite:
        raise FP8ConfigError(f"{taken[0]} exists: choose another --output, or pass --overwrite")
