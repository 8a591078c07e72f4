"""`optimum-cli fp8 quantize --without-model`: quantize the files of a checkpoint, and say what came of it."""

from __future__ import annotations

import logging
import sys
import time
from argparse import Namespace
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm.auto import tqdm

from ..commands.outcome import outcome
from ..commands.quantize import checked_config
from ..report import format_bytes, format_share
from .without_model import FilesReport, quantize_files

_NAMED = 4


def main(args: Namespace) -> int:
    """Run the command; 0 when the checkpoint is written, 1 for an error that a message explains."""
    return outcome(quantize, args, f"files that are whole stay in {args.output}.partial; the same command goes on")


def quantize(args: Namespace) -> str:
    """Quantize the files of `args.model` into `args.output`; the summary."""
    started = time.monotonic()
    config = checked_config(args)
    with _lines_on_stderr():
        report = quantize_files(
            args.model,
            args.output,
            config,
            dtype=args.dtype,
            workers=args.workers,
            share_scales=args.share_scales,
            overwrite=args.overwrite,
        )
    return _summary(report, args, time.monotonic() - started)


class _Lines(logging.Handler):
    """Writes above the progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(f"{record.levelname.lower()}: {record.getMessage()}", file=sys.stderr)


@contextmanager
def _lines_on_stderr() -> Iterator[None]:
    """Have what is logged about the files said to whoever runs the command."""
    logger, lines = logging.getLogger(__package__), _Lines()
    before = logger.level
    logger.addHandler(lines)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(lines)
        logger.setLevel(before)


def _summary(report: FilesReport, args: Namespace, seconds: float) -> str:
    rows = [
        ("model", args.model),
        ("output", args.output),
        ("told by", "names and shapes" if report.by_name else "the class of the model"),
        ("parameters in FP8", f"{format_share(report.in_fp8, report.parameters)} of all"),
        ("modules in FP8", f"{len(report.layers)} of {len(report.layers) + len(report.kept)} candidates"),
        ("kept in high precision", _kept(report) or "none"),
        ("size", format_bytes(report.size)),
        ("time", f"{seconds:.1f} s"),
    ]
    width = max(len(label) for label, _ in rows)
    return "\n".join(f"{label.ljust(width)}  {value}" for label, value in rows)


def _kept(report: FilesReport) -> str:
    """How many stay in high precision for each reason, the commonest first, with the name of one."""
    first: dict[str, str] = {}
    for name, why in report.kept.items():
        first.setdefault(why, name)
    counts = Counter(report.kept.values()).most_common()
    named = [f"{first[why]}{f' and {count - 1} more' if count > 1 else ''} ({why})" for why, count in counts[:_NAMED]]
    return ", ".join(named) + (", …" if len(counts) > _NAMED else "")
