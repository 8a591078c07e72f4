"""What a configuration passed to `from_pretrained` may change of an FP8 checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from ..checkpoint.targets import target_to_load
from ..config import FP8Config
from ..errors import FP8CheckpointError
from ..scales import STATIC, WEIGHT_ONLY
from ..selection import Decision, reschemed

# What may be chosen while loading, and what a checkpoint does not tell.
_LOADING_KEYS = ("target", "dequantize", "scale_format", "mode", "dump_stats_path")
_BY_MODULE, _TARGET = "_requested_by_module", "_requested_target"


def apply_load_overrides(config: FP8Config) -> str:
    """Apply what was asked for by a `quantization_config` passed to load an FP8 checkpoint, or refuse it.

    Returns:
        the target the checkpoint was made for.

    Raises:
        FP8CheckpointError: a key that would need the original weights or new calibration.
    """
    requested: dict[str, Any] = config.__dict__.pop("_requested", {})
    if requested.get("dataset") is not None:
        raise FP8CheckpointError(
            "a dataset was given, but this checkpoint is quantized already and cannot be calibrated again: leave it "
            "out, or quantize the original model with it"
        )
    for key, value in requested.items():
        if key in _LOADING_KEYS or value == getattr(config, key):
            continue
        if isinstance(value, dict) and key in ("overrides", "scale_method"):  # a checkpoint says them module by module
            config.__dict__.setdefault(_BY_MODULE, {})[key] = value
            continue
        raise FP8CheckpointError(
            f"{key}={value!r} was asked for, but the checkpoint was quantized with {getattr(config, key)!r}: only "
            "target, dequantize and scale_format can be chosen when loading; quantize the original model again for the "
            "rest"
        )
    if requested.get("mode", "AUTO") not in ("AUTO", "LOAD"):
        raise FP8CheckpointError(f"mode={requested['mode']!r}: this checkpoint is FP8 already; use mode='AUTO'")
    config.dequantize = requested.get("dequantize", config.dequantize)
    config.scale_format = requested.get("scale_format", config.scale_format)
    made_for = config.resolved_target
    if requested.get("target", "auto") != "auto":
        config.target = config.__dict__[_TARGET] = requested["target"]
    return made_for


def settle_target(config: FP8Config, made_for: str) -> None:
    """Have the config of a checkpoint that is about to be loaded name the target that it is loaded for."""
    config.target = target_to_load(made_for, config.__dict__.pop(_TARGET, None))


def check_module_overrides(model: nn.Module, config: FP8Config, decisions: Sequence[Decision]) -> None:
    """Refuse what was asked for single modules by a config passed to load a checkpoint, where it is not what they have.

    Raises:
        FP8CheckpointError: names the first module.
    """
    requested: dict[str, Any] = config.__dict__.pop(_BY_MODULE, {})
    if not requested:
        return
    # A checkpoint says "static" or "dynamic" where "auto" may have been asked for, which more goes together with.
    decided = config.activation_scheme
    scheme = decided if decided == WEIGHT_ONLY else "auto"
    asked = config.replace(**{"overrides": {}, "activation_scheme": scheme, **requested})
    for each, wanted in zip(decisions, reschemed(model, decisions, asked, calibrated=decided == STATIC), strict=True):
        if each.selected and wanted.scheme != each.scheme:
            raise FP8CheckpointError(
                f"{each.name}: {' and '.join(requested)} ask for {wanted.scheme}, but the checkpoint has "
                f"{each.scheme}: leave them out, or quantize the original model with them"
            )
