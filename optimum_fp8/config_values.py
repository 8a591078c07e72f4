"""What each key of FP8Config accepts, and which keys contradict each other."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from .errors import FP8ConfigError, FP8NotAvailableError, nearest
from .formats import FP8_DTYPES, HP_DTYPES, TARGETS
from .scales import ScaleMethod, scale_method

if TYPE_CHECKING:
    from .config import FP8Config

_HP_ALIASES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
_NOT_THERE = {
    "mode": {"SHAPE", "NONE"},
    "observer": {"maxabs_per_channel", "save", "shape"},
}
# Switches of INC that have no counterpart (yet): off is how things are, on is an error.
INC_KEYS_NOT_THERE = ("fake_quant", "row_parallel_linear_allreduce_quantization", "calibration_sample_interval")
# Class names of INC's module table that stand for operations not covered (yet).
INC_TYPES_NOT_THERE = frozenset(
    [
        "Matmul",
        "B2BMatmul",
        "ParallelLMHead",
        "RowParallelLinear",
        "ColumnParallelLinear",
        "MergedColumnParallelLinear",
        "QKVParallelLinear",
        "ReplicatedLinear",
        "KVCache",
        "VLLMKVCache",
        "LoRACompatibleLinear",
        "LoRACompatibleConv",
        "Softmax",
        "BlockSoftmaxConstMax",
        "ModuleFusedSDPA",
        "MoeMatmul",
        "MoeFP8Matmul",
        "GaudiFP8Linear",
        "FusedMoE",
        "SharedFusedMoE",
        "GaudiMixtralSparseMoeBlock",
        "GaudiDeepseekV3MoE",
        "VllmMixtureOfExpertsOp",
        "VllmMixtureOfExpertsOpFP8",
        "VllmMixtureOfExpertsOpFP8PerChannel",
        "LinearLayer",
        "LinearAllreduce",
        "ScopedLinearAllReduce",
        "LmHeadLinearAllreduce",
        "EmbeddingBag",
    ]
)


def normalize(key: str, value: Any) -> Any:
    """The canonical form of `value` for `key`, or an FP8ConfigError that names the nearest valid value."""
    return NORMALIZERS[key](key, value)


def _choice(*choices: str) -> Callable[[str, Any], str]:
    def check(key: str, value: Any) -> str:
        by_lower = {choice.lower(): choice for choice in choices}
        text = str(value).lower()
        if text in by_lower:
            return by_lower[text]
        if text in {name.lower() for name in _NOT_THERE.get(key, ())}:
            raise FP8NotAvailableError(f"{key}={value!r} is not available in optimum_fp8 yet: use {choices[0]!r}")
        raise FP8ConfigError(f"{key}={value!r} is not valid: {nearest(str(value), choices)}")

    return check


def _boolean(key: str, value: Any) -> bool:
    if isinstance(value, bool):
        return value
    if str(value).lower() in ("true", "false"):
        return str(value).lower() == "true"
    raise FP8ConfigError(f"{key}={value!r} is not valid: expected True or False")


def _count(key: str, value: Any) -> int:
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return value
    raise FP8ConfigError(f"{key}={value!r} is not valid: expected a whole number above 0")


def _whole(key: str, value: Any) -> int:
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    raise FP8ConfigError(f"{key}={value!r} is not valid: expected a whole number, 0 or above")


def _backoff(key: str, value: Any) -> float | None:
    if value is None:
        return None
    if isinstance(value, (int, float)) and not isinstance(value, bool) and 0.0 < value <= 1.0:
        return float(value)
    raise FP8ConfigError(f"{key}={value!r} is not valid: expected 0 < {key} <= 1, or None for the method's")


def _hp_dtype(key: str, value: Any) -> str:
    name = str(value).removeprefix("torch.").lower() if isinstance(value, (str, torch.dtype)) else value
    return _choice(*HP_DTYPES)(key, _HP_ALIASES.get(name, name))


def _scale_method(key: str, value: Any) -> str:
    if isinstance(value, dict):
        raise FP8NotAvailableError("scale_method as a dict is not available in optimum_fp8 yet: give a method's name")
    return scale_method(value).name


def _path_prefix(key: str, value: Any) -> str:
    path = os.fspath(value) if isinstance(value, (str, os.PathLike)) else ""
    if not os.path.basename(path):
        raise FP8ConfigError(f"{key}={value!r} is not valid: expected a folder and a file prefix, as './stats/measure'")
    return path


def _text(key: str, value: Any) -> str:
    if isinstance(value, str) and value:
        return value
    raise FP8ConfigError(f"{key}={value!r} is not valid: expected a non-empty string")


def _live(key: str, value: Any) -> Any:
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if not isinstance(value, (int, float, bytes)):
        return value
    raise FP8ConfigError(f"{key} of type {type(value).__name__} is not valid: expected a {key} or its path")


def _dataset(key: str, value: Any) -> Any:
    usable = value is None or callable(value) or isinstance(value, (Iterable, os.PathLike))
    if usable and not isinstance(value, (Mapping, torch.Tensor, bytes)):
        return os.fspath(value) if isinstance(value, os.PathLike) else value
    raise FP8ConfigError(
        f"{key} of type {type(value).__name__} is not valid: expected a list of strings, the path of a text or "
        "JSON-lines file, a datasets.Dataset (one split), a DataLoader, an iterable of batches, or a callable"
    )


def refuse_inc_switches(options: dict[str, Any]) -> dict[str, Any]:
    """`options` without INC's switches that have no counterpart.

    Raises:
        FP8NotAvailableError: one of them is on.
    """
    for key in INC_KEYS_NOT_THERE:
        if str(options.pop(key, None)).lower() not in ("false", "0", "none"):
            raise FP8NotAvailableError(f"{key} is not available in optimum_fp8 yet: remove it")
    return options


def _names(key: str, value: Any) -> list[str] | None:
    if value is None:
        return None
    if isinstance(value, (list, tuple)) and all(isinstance(name, str) and name for name in value):
        for name in value:
            _check_regex(key, name)
        return list(value)
    raise FP8ConfigError(f"{key}={value!r} is not valid: expected a list of module names")


def _module_list(key: str, value: Any) -> dict[str, list[str]]:
    """{"names": [...], "types": [...]} with names that compile as regular expressions and types as strings."""
    value = {} if value is None else value
    if not isinstance(value, dict):
        raise FP8ConfigError(f"{key}={value!r} is not valid: expected {{'names': [...], 'types': [...]}}")
    for part in value:
        if part not in ("names", "types"):
            raise FP8ConfigError(f"unknown key {part!r} in {key}: {nearest(str(part), ('names', 'types'))}")
    names, types = (_as_list(f"{key}[{part!r}]", value.get(part)) for part in ("names", "types"))
    for name in names:
        _check_regex(f"{key}['names']", name)
    return {"names": names, "types": [_type_name(key, kind) for kind in types]}


def _check_regex(where: str, name: Any) -> None:
    try:
        re.compile(name)
    except (re.error, TypeError) as error:
        raise FP8ConfigError(f"{where} holds {name!r}, not a regular expression: {error}") from None


def _as_list(where: str, value: Any) -> list[Any]:
    if value is None:
        return []
    if isinstance(value, (list, tuple, set)):
        return list(value)
    raise FP8ConfigError(f"{where}={value!r} is not valid: expected a list")


def _type_name(key: str, kind: Any) -> str:
    if isinstance(kind, type):
        return f"{kind.__module__}.{kind.__qualname__}"
    if not isinstance(kind, str) or not kind:
        raise FP8ConfigError(f"{key}['types'] holds {kind!r}: expected classes or class names")
    if key == "allowlist" and kind.removeprefix("torch.nn.") in INC_TYPES_NOT_THERE:
        raise FP8NotAvailableError(
            f"allowlist type {kind!r} is not available in optimum_fp8 yet: use Linear, Conv2d; attention=True and "
            "kv_cache=True take the place of the types of attention and caches"
        )
    return kind


NORMALIZERS: dict[str, Callable[[str, Any], Any]] = {
    "fp8_config": _choice(*FP8_DTYPES),
    "hp_dtype": _hp_dtype,
    "observer": _choice("maxabs"),
    "allowlist": _module_list,
    "blocklist": _module_list,
    "mode": _choice("AUTO", "MEASURE", "QUANTIZE", "LOAD"),
    "dump_stats_path": _path_prefix,
    "scale_method": _scale_method,
    "measure_exclude": _choice("NONE", "INPUT", "OUTPUT", "PARAMS", "ALL"),
    "input_backoff": _backoff,
    "weight_backoff": _backoff,
    "scale_format": _choice("scalar", "const"),
    "ignore_modules_wo_measures": _boolean,
    "dynamic_quantization": _boolean,
    "use_qdq": _boolean,
    "target": _choice("auto", *TARGETS),
    "activation_scheme": _choice("auto", "static", "dynamic", "weight_only"),
    "dataset": _dataset,
    "tokenizer": _live,
    "processor": _live,
    "num_calibration_samples": _count,
    "max_seq_length": _count,
    "batch_size": _count,
    "text_column": _text,
    "modules_to_not_convert": _names,
    "quantize_lm_head": _boolean,
    "attention": _boolean,
    "kv_cache": _boolean,
    "attention_granularity": _choice("tensor", "head"),
    "attention_dataflow": _choice("fused", "unfused"),
    "softmax_backoff": _backoff,
    "decode_steps": _whole,
    "dequantize": _boolean,
    "format_version": _count,
}


def check_combinations(config: FP8Config, method: ScaleMethod) -> None:
    """Raise FP8ConfigError where keys contradict each other."""
    scheme, has_data = config.activation_scheme, config.dataset is not None
    fixed = not method.activation.needs_range
    unmeasured = "input" not in config.measured and not fixed
    rules = [
        (
            config.dynamic_quantization and scheme in ("static", "weight_only"),
            f"dynamic_quantization=True contradicts activation_scheme={scheme!r}: drop one of them",
        ),
        (
            scheme == "static" and method.dynamic_only,
            f"scale_method={method.name!r} only exists dynamically: use activation_scheme='dynamic'",
        ),
        (
            config.scheme == "dynamic" and fixed,
            f"scale_method={method.name!r} is a fixed scale, nothing about it is dynamic: use activation_scheme="
            "'static', or a maxabs method",
        ),
        (
            has_data and config.scheme in ("dynamic", "weight_only"),
            f"dataset is given, but activations are {config.scheme!r} and need no calibration: drop the dataset, or "
            "use activation_scheme='static'",
        ),
        (
            unmeasured and (scheme == "static" or (has_data and config.scheme == "auto")),
            f"measure_exclude={config.measure_exclude!r} leaves inputs unmeasured, but static activations need their "
            "ranges: use measure_exclude='OUTPUT'",
        ),
        (
            config.mode == "MEASURE" and config.scheme in ("dynamic", "weight_only"),
            f"mode='MEASURE' has nothing to measure for activation_scheme={config.scheme!r}: use mode='AUTO'",
        ),
        (
            config.mode == "MEASURE" and not config.measured,
            f"mode='MEASURE' has nothing to measure with measure_exclude={config.measure_exclude!r}: use 'OUTPUT'",
        ),
        (
            config.mode in ("QUANTIZE", "LOAD") and has_data,
            f"mode={config.mode!r} does not calibrate, but a dataset is given: use mode='AUTO', or drop the dataset",
        ),
        (
            config.attention and config.scheme == "weight_only",
            "attention=True rounds activations, which activation_scheme='weight_only' leaves alone: use 'static' or "
            "'dynamic', or kv_cache=True alone",
        ),
        (
            config.dequantize and (has_data or config.mode == "MEASURE"),
            "dequantize=True loads a high-precision model: it cannot be combined with a dataset or mode='MEASURE'",
        ),
    ]
    for broken, message in rules:
        if broken:
            raise FP8ConfigError(message)
