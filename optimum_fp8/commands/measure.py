"""`optimum-cli fp8 measure`: run calibration data through a model in high precision, and write the ranges."""

from __future__ import annotations

import sys
import time
from argparse import Namespace

from ..config import FP8Config
from ..config.flags import given_flags
from ..errors import FP8ConfigError
from ..measure import measurements_path
from .outcome import check_prefix, outcome
from .quantize import class_of


def main(args: Namespace) -> int:
    """Run the command; 0 when the measurements are written, 1 for an error that a message explains."""
    return outcome(measure, args)


def measure(args: Namespace) -> str:
    """Measure `args.model`; the summary."""
    started = time.monotonic()
    config = _config(args)
    check_prefix(config.dump_stats_path, args.overwrite)
    model = class_of(args.model).from_pretrained(args.model, quantization_config=config, dtype=args.dtype)
    return "\n".join(
        [
            f"model         {args.model} in {str(model.dtype).removeprefix('torch.')}",
            f"measurements  {measurements_path(config.dump_stats_path)}",
            f"for use with  --mode QUANTIZE --dump-stats-path {config.dump_stats_path}",
            f"time          {time.monotonic() - started:.1f} s",
        ]
    )


def _config(args: Namespace) -> FP8Config:
    given = given_flags(args)
    if str(given.get("mode", "MEASURE")).upper() != "MEASURE":
        raise FP8ConfigError(
            f"--mode {given['mode']} does not measure: leave it out, or use `optimum-cli fp8 quantize`"
        )
    if args.output is not None:
        if given.get("dump_stats_path") not in (None, args.output):
            raise FP8ConfigError(f"--output and --dump-stats-path {given['dump_stats_path']!r} are the same: give one")
        given["dump_stats_path"] = args.output
    config = FP8Config.from_json_file(args.config) if args.config else FP8Config()
    if config.mode not in ("AUTO", "MEASURE") and args.config:
        print(f"note: mode {config.mode} of {args.config} is not used: this run measures", file=sys.stderr)
    config = config.replace(**{**given, "mode": "MEASURE"})
    if config.dataset is None:
        raise FP8ConfigError("there is nothing to measure with: pass --dataset")
    return config
