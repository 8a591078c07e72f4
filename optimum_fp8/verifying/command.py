"""`optimum-cli fp8 verify`, and `--verify` of the commands that write checkpoints: what is wrong, one line each."""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Sequence
from typing import Any

from ..commands.outcome import outcome
from ..errors import FP8CheckpointError
from .finding import ERROR, Finding
from .run import verify


def main(args: Namespace) -> int:
    """Run the command; 0 where nothing is wrong, warnings aside, and 1 where something is."""
    found: list[Finding] = []

    def step(args: Namespace) -> str:
        found.extend(verify(args.folder, against=args.against))
        return "\n".join([*map(str, found), summary(args.folder, found)])

    return outcome(step, args, "nothing was changed") or int(any(each.severity == ERROR for each in found))


def verify_written(output: str, model: str | None = None) -> int:
    """The command for what another one has written; with the folder of the `model` it was made of, against that."""
    against = model if model is not None and os.path.isdir(model) else None
    return main(Namespace(folder=output, against=against))


def check_written(model: Any, folder: str) -> None:
    """Check a checkpoint that was written against the model in memory, in another process; what is wrong is printed.

    Raises:
        FP8CheckpointError: something is wrong; the folder stays.
    """
    found = verify(folder, model=model)
    print("\n".join([*map(str, found), summary(folder, found)]))
    if any(each.severity == ERROR for each in found):
        raise FP8CheckpointError(f"{folder} was written, but is not what the model in memory is: see above")


def summary(folder: str, found: Sequence[Finding]) -> str:
    """One line that says how much is wrong with a folder."""
    errors = sum(each.severity == ERROR for each in found)
    counts = f"{errors} {'error' if errors == 1 else 'errors'}, {len(found) - errors} warnings"
    return f"{os.path.abspath(folder)}: {counts if found else 'nothing wrong was found'}"
