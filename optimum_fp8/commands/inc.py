"""`optimum-cli fp8 import-inc` and `export-inc`: measurements from Intel Neural Compressor's files, and to them."""

from __future__ import annotations

import os
import sys
from argparse import Namespace
from typing import Any

from ..config import FP8Config
from ..config.flags import given_flags
from ..errors import FP8ConfigError, FP8MeasurementError
from ..lifecycle import inc_scales, new_measurements, signed, weights_of
from ..measure import files_of_inc, has_inc_ranges
from ..measure.inc import SCALES, File, inc_paths, names_of, nodes_of, scaling_of, write_file, write_inc
from .outcome import check_prefix, loaded, outcome, refuse_taken
from .quantize import class_of


def main_import(args: Namespace) -> int:
    """Run `import-inc`; 0 when the measurements are written, 1 for an error that a message explains."""
    return outcome(import_inc, args)


def main_export(args: Namespace) -> int:
    """Run `export-inc`; 0 when the files are written, 1 for an error that a message explains."""
    return outcome(export_inc, args)


def import_inc(args: Namespace) -> str:
    """INC's measurements at `args.measurements` as a file of ours; the summary."""
    check_prefix(args.output, args.overwrite)
    if not has_inc_ranges(args.measurements):
        loaded(args.measurements)  # says what is wrong, where something is
        raise FP8MeasurementError(f"{args.measurements} has measurements of ours already: use them as they are")
    found: Any = loaded(args.measurements)
    if args.model:
        model = _high_precision(args.model)
        found = signed(found, model, new_measurements(model, FP8Config()), args.measurements)
        if isinstance(found, str):
            raise FP8MeasurementError(f"{args.measurements} is of another model than {args.model}: {found}")
    else:
        print(
            "note: without --model, names of modules stay INC's, and the model is checked when they are used",
            file=sys.stderr,
        )
    path = found.save(args.output)
    return f"{path}: {len(found.tensors)} tensors of {len({name for name, _ in found.tensors})} modules"


def export_inc(args: Namespace) -> str:
    """Measurements of ours at `args.measurements` as INC's files; what was written."""
    config, ranks = FP8Config(**given_flags(args)), args.ranks
    if ranks < 0:
        raise FP8ConfigError(f"--ranks {ranks} must be positive, or 0 for names without ranks")
    method = "" if args.scale_method is None else config.method.name.upper()
    _check_output(args, method)
    measurements = loaded(args.measurements)
    model = _high_precision(args.model) if args.model else None
    made = nodes_of(measurements.tensors, vllm=args.vllm, scaling=scaling_of(model) if model else None)
    if made.left_out:
        print(f"warning: INC has no place for {', '.join(made.left_out[:8])}", file=sys.stderr)
    if made.without_outputs:
        print(
            f"warning: vLLM needs ranges of the outputs of {', '.join(made.without_outputs[:4])}: measure with "
            "measure_exclude=NONE",
            file=sys.stderr,
        )
    scales = None
    if method:
        weights = (weights_of(model),) if model else ()
        scales = inc_scales(made.nodes, config, *weights)
    paths = write_inc(args.output, made.nodes, samples=measurements.samples, ranks=ranks)
    if scales is not None:
        for name in names_of(args.output, method=method, ranks=ranks):
            paths += write_file(name, File(SCALES, scales, name.rank if name.world else None))
    return "\n".join(paths)


def _check_output(args: Namespace, method: str) -> None:
    folder, base = os.path.split(args.output)
    if not folder or not base:
        raise FP8ConfigError(f"--output {args.output!r} must be a folder and the beginning of a file name, for INC")
    planned = [
        *inc_paths(args.output, ranks=args.ranks),
        *(inc_paths(args.output, method=method, ranks=args.ranks) * bool(method)),
    ]
    refuse_taken(planned, args.overwrite)
    stale = sorted(set(files_of_inc(args.output)) - set(planned))
    if stale:
        raise FP8ConfigError(
            f"{stale[0]} is of other measurements, and INC would go on using it: delete it, or choose another --output"
        )


def _high_precision(name: str) -> Any:
    return class_of(name).from_pretrained(name, dtype="auto")
