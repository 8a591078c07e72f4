"""`optimum-cli fp8 export`: an FP8 checkpoint of ours in, one that another engine loads out."""

from __future__ import annotations

from argparse import Namespace

from ..commands.outcome import outcome
from .engine_checkpoint import export


def main(args: Namespace) -> int:
    """Run the command; 0 when the folder is written, 1 for an error that a message explains."""
    return outcome(_export, args)


def _export(args: Namespace) -> str:
    folder = export(args.model, args.output, args.format, without=args.without)
    return f"{folder}: a checkpoint in the format {args.format}"
