"""`optimum-cli fp8 export`: an FP8 checkpoint of ours in, what another engine loads out."""

from __future__ import annotations

from argparse import Namespace

from ..commands.outcome import outcome
from ..errors import FP8ConfigError
from .engine_checkpoint import export
from .inc_folder import NAME


def main(args: Namespace) -> int:
    """Run the command; 0 when the folder is written, 1 for an error that a message explains."""
    return outcome(_export, args)


def _export(args: Namespace) -> str:
    if args.format == NAME and args.verify:
        raise FP8ConfigError(
            f"--verify with --format {NAME}: the folder holds no checkpoint to verify, only files for Intel Neural "
            "Compressor; leave out --verify, and verify the checkpoint that is exported: optimum-cli fp8 verify "
            f"{args.model}"
        )
    folder = export(args.model, args.output, args.format, without=args.without)
    what = "files for Intel Neural Compressor" if args.format == NAME else f"a checkpoint in the format {args.format}"
    return f"{folder}: {what}"
