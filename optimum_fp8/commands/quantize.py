"""`optimum-cli fp8 quantize`: load, quantize, calibrate, save, and say what came of it."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Iterable
from typing import Any

import transformers
from transformers import AutoConfig

from ..calibration import check_dataset
from ..checkpoint.inc import refuse_incs
from ..checkpoint.whole_folder import explained, put_in_place
from ..config import QUANT_METHOD, FP8Config
from ..config.flags import given_flags
from ..config.keys import KEYS
from ..config.presets import preset
from ..errors import FP8ConfigError, FP8StateError
from ..lifecycle import are_there
from ..lifecycle.state import state_of
from ..measure import kept_until_saved, why_unwritable
from ..report import QuantizationReport, format_bytes, format_share, quantization_report
from .companions import companions_of, copy_companions
from .outcome import outcome

_LITTLE = 0.5  # a share of parameters in FP8 below which the command warns
_NAMED = 4  # so many of the modules in high precision are named

_NO_DATA = "static activations need calibration data: pass --dataset, or --activation-scheme dynamic"


def main(args: Namespace) -> int:
    """Run the command; 0 when the checkpoint is written, 1 for an error that a message explains."""
    return outcome(quantize, args, "nothing was written; a calibration goes on when run again")


def quantize(args: Namespace) -> str:
    """Quantize `args.model` into `args.output`; the summary. `args.check`, if given, is called with both at the end."""
    started = time.monotonic()
    if args.workers != 1 or args.share_scales:
        raise FP8ConfigError("--workers and --share-scales go with --without-model: add it, or leave them out")
    config = checked_config(args)
    needs_data = config.mode == "AUTO" and config.scheme == "static" and config.method.activation.needs_range
    if needs_data and config.dataset is None and not are_there(config.dump_stats_path):
        raise FP8StateError(_NO_DATA)
    model_class = class_of(args.model)
    beside = companions_of(args.model)
    with kept_until_saved():
        model = model_class.from_pretrained(args.model, quantization_config=config, dtype=args.dtype)
        state = state_of(model)
        if state is None or state.phase != "converted":
            raise FP8StateError(_NO_DATA)
        _save(model, beside, args.output)
    if (check := getattr(args, "check", None)) is not None:
        check(model, args.output)
    report = quantization_report(model)
    if report.share < _LITTLE:
        print(
            f"warning: only {_share(report, report.size.in_fp8)} of all parameters are in FP8; in high precision stay "
            f"{_kept(report)}",
            file=sys.stderr,
        )
    return _summary(model, report, args, time.monotonic() - started)


def checked_config(args: Namespace) -> FP8Config:
    """The configuration that a command line says, once it is known that its output can be written."""
    _check_output(args)
    return _fp8_config(args)


def _check_output(args: Namespace) -> None:
    output = os.path.abspath(args.output)
    if os.path.isdir(args.model) and os.path.abspath(args.model) == output:
        raise FP8ConfigError(f"--output {args.output!r} is the model's own folder: choose another")
    if os.path.exists(output) and not args.overwrite and (not os.path.isdir(output) or os.listdir(output)):
        raise FP8ConfigError(f"--output {args.output!r} exists: choose another, or pass --overwrite")
    reason = why_unwritable(os.path.dirname(output))
    if reason is not None:
        raise FP8ConfigError(f"--output {args.output!r} cannot be made: {reason}; choose another")


def _fp8_config(args: Namespace) -> FP8Config:
    given = {**(preset(args.preset) if args.preset else {}), **given_flags(args)}
    if "dataset" in given:
        check_dataset(given["dataset"])
    config = FP8Config.from_json_file(args.config) if args.config else FP8Config()
    if "mode" in given:
        _check_mode(given["mode"])
    elif config.mode in ("MEASURE", "LOAD") or (config.mode == "QUANTIZE" and "dataset" in given):
        note = f"note: mode {config.mode} of {args.config} is not used: this is one run from model to checkpoint"
        print(note, file=sys.stderr)
        given["mode"] = "AUTO"
    return config.replace(**given)


def _check_mode(mode: str) -> None:
    mode = KEYS["mode"].normalize(mode)
    if mode in ("MEASURE", "LOAD"):
        raise FP8ConfigError(f"--mode {mode} makes no checkpoint: use AUTO, or QUANTIZE with ranges that are there")


def class_of(name: str) -> Any:
    """The class of transformers that the checkpoint `name` was saved from."""
    if name.startswith((".", "/", "~")) and not os.path.isdir(name):
        raise FP8ConfigError(f"--model {name!r} is not a folder")
    refuse_incs(name)
    config = AutoConfig.from_pretrained(name)
    method = (getattr(config, "quantization_config", None) or {}).get("quant_method", QUANT_METHOD)
    if method != QUANT_METHOD:
        raise FP8ConfigError(
            f"--model {name!r} is quantized already (quant_method={method!r}): give the model in high precision; FP8 "
            "checkpoints of other makers are loaded as they are with optimum_fp8.native_config"
        )
    architectures = getattr(config, "architectures", None) or []
    if not architectures or not hasattr(transformers, architectures[0]):
        raise FP8ConfigError(f"{name!r} does not say which transformers model it is (architectures={architectures})")
    return getattr(transformers, architectures[0])


def _save(model: Any, beside: str, output: str) -> None:
    """Write beside `output`, then move there: a folder that exists is whole."""
    parent = os.path.dirname(os.path.abspath(output))
    with explained(output):
        os.makedirs(parent, exist_ok=True)
        temporary = tempfile.mkdtemp(dir=parent, prefix=".fp8-")
        try:
            model.save_pretrained(temporary)
            copy_companions(beside, temporary, apart_from=output)
            os.chmod(temporary, 0o755)
            put_in_place(temporary, output)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _summary(model: Any, report: QuantizationReport, args: Namespace, seconds: float) -> str:
    config = model.config.quantization_config
    size = report.size
    rows = [
        ("model", args.model),
        ("output", args.output),
        ("parameters in FP8", f"{_share(report, size.in_fp8)} of all"),
        ("modules in FP8", f"{len(report.quantized)} of {len(report.modules)} candidates"),
        ("attention in FP8", _attention(report, config)),
        ("kept in high precision", _kept(report) or "none"),
        ("format", _all(f"{part.fp8_config} for {part.target}" for part in config.variants.values())),
        ("scale method", ", ".join(dict.fromkeys(method.name for method in config.methods))),
        ("activations", _all(part.activation_scheme for part in config.variants.values())),
        (
            "size",
            f"{format_bytes(size.high_precision)} in {str(model.dtype).split('.')[1]}, now {format_bytes(size.now)}",
        ),
        ("time", f"{seconds:.1f} s"),
    ]
    rows = [(label, value) for label, value in rows if value]
    width = max(len(label) for label, _ in rows)
    return "\n".join(f"{label.ljust(width)}  {value}" for label, value in rows)


def _kept(report: QuantizationReport) -> str:
    """What stays in high precision, with its share of all parameters and why; the largest first."""
    parts = [(each, _share(report, each.parameters) if each.parameters else "shared") for each in report.kept]
    listed = [f"{each.label} ({share}, {each.reason})" for each, share in parts[:_NAMED]]
    return ", ".join(listed) + (", …" if len(parts) > _NAMED else "")


def _share(report: QuantizationReport, parameters: int) -> str:
    return format_share(parameters, report.size.parameters)


def _attention(report: QuantizationReport, config: FP8Config) -> str:
    """How many attention modules compute or cache in FP8; empty where neither was asked for."""
    if not config.wants_attention:
        return ""
    parts = [name for name, wanted in (("products", config.attention), ("cache", config.kv_cache)) if wanted]
    return f"{sum(row.quantized for row in report.attention)} of {len(report.attention)} ({', '.join(parts)})"


def _all(values: Iterable[str]) -> str:
    """Each of the values once, the model's first, then those of modules that differ."""
    return ", ".join(dict.fromkeys(values))
