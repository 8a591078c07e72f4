"""`optimum-cli fp8 quantize`: load, quantize, calibrate, save, and say what came of it."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Iterable
from fnmatch import fnmatch
from typing import Any

import transformers
from transformers import AutoConfig

from ..config import FP8Config
from ..config.keys import KEYS, given_flags
from ..errors import FP8ConfigError, FP8Error, FP8StateError
from ..lifecycle.state import state_of
from ..report import QuantizationReport, quantization_report

# Files beside the weights that a pipeline needs: tokenizers, processors, chat templates.
_COMPANIONS = [
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "*.model",
    "chat_template*",
    "*processor_config.json",
]


def main(args: Namespace) -> int:
    """Run the command; 0 when the checkpoint is written, 1 for an error that a message explains."""
    try:
        print(quantize(args))
        return 0
    except (FP8Error, OSError, ValueError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted: nothing was written", file=sys.stderr)
        return 130


def quantize(args: Namespace) -> str:
    """Quantize `args.model` into `args.output`; the summary."""
    started = time.monotonic()
    _check_output(args)
    config = _fp8_config(args)
    model_class = _model_class(args.model)
    model = model_class.from_pretrained(args.model, quantization_config=config, dtype=args.dtype)
    state = state_of(model)
    if state is None or state.phase != "converted":
        raise FP8StateError("static activations need calibration data: pass --dataset, or --activation-scheme dynamic")
    _save(model, args.model, args.output)
    return _summary(model, quantization_report(model), args, time.monotonic() - started)


def _check_output(args: Namespace) -> None:
    output = os.path.abspath(args.output)
    if os.path.isdir(args.model) and os.path.abspath(args.model) == output:
        raise FP8ConfigError(f"--output {args.output!r} is the model's own folder: choose another")
    if os.path.exists(output) and not args.overwrite and (not os.path.isdir(output) or os.listdir(output)):
        raise FP8ConfigError(f"--output {args.output!r} exists: choose another, or pass --overwrite")


def _fp8_config(args: Namespace) -> FP8Config:
    given = given_flags(args)
    if given.get("dataset") is not None and not os.path.isfile(given["dataset"]):
        raise FP8ConfigError(f"--dataset {given['dataset']!r} is not a file: expected a .txt, .md or .jsonl file")
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


def _model_class(name: str) -> Any:
    """The class the checkpoint was saved from."""
    if name.startswith((".", "/", "~")) and not os.path.isdir(name):
        raise FP8ConfigError(f"--model {name!r} is not a folder")
    architectures = getattr(AutoConfig.from_pretrained(name), "architectures", None) or []
    if not architectures or not hasattr(transformers, architectures[0]):
        raise FP8ConfigError(f"{name!r} does not say which transformers model it is (architectures={architectures})")
    return getattr(transformers, architectures[0])


def _save(model: Any, source: str, output: str) -> None:
    """Write beside `output`, then move there: a folder that exists is whole."""
    parent = os.path.dirname(os.path.abspath(output))
    os.makedirs(parent, exist_ok=True)
    temporary = tempfile.mkdtemp(dir=parent, prefix=".fp8-")
    try:
        model.save_pretrained(temporary)
        _copy_companions(source, temporary)
        os.chmod(temporary, 0o755)
        if os.path.isdir(output):
            shutil.rmtree(output)
        elif os.path.exists(output):
            os.remove(output)
        os.replace(temporary, output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _copy_companions(source: str, folder: str) -> None:
    """Tokenizer and processor: with them the checkpoint is complete."""
    if not os.path.isdir(source):
        transformers.AutoProcessor.from_pretrained(source).save_pretrained(folder)
        return
    for name in os.listdir(source):
        if any(fnmatch(name, pattern) for pattern in _COMPANIONS) and os.path.isfile(os.path.join(source, name)):
            shutil.copy2(os.path.join(source, name), folder)


def _summary(model: Any, report: QuantizationReport, args: Namespace, seconds: float) -> str:
    fp8 = sum(p.numel() * p.element_size() for p in model.parameters())
    high_precision = sum(
        p.numel() * (model.dtype.itemsize if p.element_size() == 1 else p.element_size()) for p in model.parameters()
    )
    config = model.config.quantization_config
    reasons = sorted({f"{module.name} ({module.reason})" for module in report.modules if not module.quantized})
    rows = [
        ("model", args.model),
        ("output", args.output),
        ("modules in FP8", f"{len(report.quantized)} of {len(report.modules)}"),
        ("attention in FP8", _attention(report, config)),
        ("kept in high precision", ", ".join(reasons[:4]) + (", …" if len(reasons) > 4 else "") or "none"),
        ("format", _all(f"{part.fp8_config} for {part.target}" for part in config.variants.values())),
        ("scale method", ", ".join(dict.fromkeys(method.name for method in config.methods))),
        ("activations", _all(part.activation_scheme for part in config.variants.values())),
        ("parameters", f"{_megabytes(high_precision)} in {str(model.dtype).split('.')[1]}, now {_megabytes(fp8)}"),
        ("time", f"{seconds:.1f} s"),
    ]
    rows = [(label, value) for label, value in rows if value]
    width = max(len(label) for label, _ in rows)
    return "\n".join(f"{label.ljust(width)}  {value}" for label, value in rows)


def _attention(report: QuantizationReport, config: FP8Config) -> str:
    """How many attention modules compute or cache in FP8; empty where neither was asked for."""
    if not config.wants_attention:
        return ""
    parts = [name for name, wanted in (("products", config.attention), ("cache", config.kv_cache)) if wanted]
    return f"{sum(row.quantized for row in report.attention)} of {len(report.attention)} ({', '.join(parts)})"


def _all(values: Iterable[str]) -> str:
    """Each of the values once, the model's first, then those of modules that differ."""
    return ", ".join(dict.fromkeys(values))


def _megabytes(count: int) -> str:
    return f"{count / 2**20:.1f} MiB"
