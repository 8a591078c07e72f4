"""`optimum-cli fp8 merge-lora`: an FP8 checkpoint and an adapter in, the merged FP8 checkpoint out."""

from __future__ import annotations

from argparse import Namespace

from ..commands.outcome import outcome
from .merge import merge_lora


def main(args: Namespace) -> int:
    """Run the command; 0 when the folder is written, 1 for an error that a message explains."""
    return outcome(_merge, args)


def _merge(args: Namespace) -> str:
    report = merge_lora(args.model, args.adapter, args.output, trained_on=args.trained_on, original=args.original)
    return str(report)
