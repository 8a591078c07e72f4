"""`optimum-cli fp8 rescale` and `requantize`: a checkpoint of ours in, one with other scales or another format out."""

from __future__ import annotations

from argparse import Namespace

from ..commands.outcome import outcome
from ..config import FP8Config
from ..config.flags import given_flags
from ..report import format_share
from .new_format import requantize
from .new_scales import rescale
from .opened import Rewritten


def main(args: Namespace) -> int:
    """Run `rescale`; 0 when the folder is written, 1 for an error that a message explains."""
    return outcome(_rescale, args)


def main_requantize(args: Namespace) -> int:
    """Run `requantize`; 0 when the folder is written, 1 for an error that a message explains."""
    return outcome(_requantize, args)


def _rescale(args: Namespace) -> str:
    made = rescale(
        args.checkpoint, args.output, scale_method=args.scale_method, target=args.target, original=args.original
    )
    return _summary(made)


def _requantize(args: Namespace) -> str:
    keys = given_flags(args)
    config = FP8Config.preset(args.preset, **keys) if args.preset else FP8Config(**keys)
    return _summary(requantize(args.checkpoint, args.output, config))


def _summary(made: Rewritten) -> str:
    config, rows = made.config, [("output", made.output)]
    how = f"{config.method.name}, {config.activation_scheme}"
    rows.append(("format", f"{config.fp8_config} for {config.resolved_target}, {how}"))
    if made.original:
        rows.append(("weights", f"quantized anew from {made.original}"))
    else:
        weights, rounded = (sum(getattr(row, name) for row in made.rows) for name in ("weights", "rounded"))
        rows += [
            ("weights rounded again", f"{rounded} ({format_share(rounded, weights)} of those in FP8)"),
            ("modules rounded again", f"{len(made.rounded)} of {len(made.rows)}"),
            ("largest added error", f"{made.error:.2%} of a module's weights"),
        ]
    width = max(len(label) for label, _ in rows)
    lines = [f"{label.ljust(width)}  {value}" for label, value in rows]
    return "\n".join([*lines, *(f"  {row.error:7.2%}  {row.module}: {row.rounded} weights" for row in made.rounded)])
