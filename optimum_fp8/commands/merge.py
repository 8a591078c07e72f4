"""`optimum-cli fp8 merge`: the measurements of several runs, or ranks, as one file."""

from __future__ import annotations

from argparse import Namespace

from ..errors import FP8Error, FP8MeasurementError
from ..lifecycle import is_unsigned
from ..measure import Measurements
from ..measure.inc import weights_that_differ
from .outcome import check_prefix, loaded, outcome


def main(args: Namespace) -> int:
    """Run the command; 0 when the file is written, 1 for an error that a message explains."""
    return outcome(merge, args)


def merge(args: Namespace) -> str:
    """Merge the measurements at `args.measurements` into `args.output`; the summary."""
    check_prefix(args.output, args.overwrite)
    first, *others = args.measurements
    merged = loaded(first)
    for path in others:
        other = loaded(path)
        try:
            _refuse_other_weights(merged, other)
            merged = merged.merged(other)
        except FP8Error as error:
            raise FP8MeasurementError(f"{path} does not go with {first}: {error}") from None
    path = merged.save(args.output)
    return f"{path}: {len(merged.tensors)} tensors, {merged.samples} samples of {len(args.measurements)} files"


def _refuse_other_weights(one: Measurements, other: Measurements) -> None:
    """Measurements without a fingerprint are of one model where their weights are the same."""
    if is_unsigned(one) and is_unsigned(other):
        wrong = weights_that_differ(other.tensors, lambda name: one.range(name, "weight"))
        if wrong:
            name, (said, has) = next(iter(wrong.items()))
            raise FP8MeasurementError(f"they are of different models: the weight of {name} has {said:g} and {has:g}")
