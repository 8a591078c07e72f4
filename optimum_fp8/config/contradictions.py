"""Which keys of FP8Config contradict each other: rules about a module's keys, and rules about the whole model's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Rule:
    """Keys that cannot stand together.

    Attributes:
        broken: whether a config breaks the rule.
        message: what to say then; `{c.key!r}` shows a key of the config.
    """

    broken: Callable[[Any], bool]
    message: str


# Checked for what the config says of most modules, and again for each override and entry of `scale_method`.
MODULE_RULES = [
    Rule(
        lambda c: c.dynamic_quantization and c.activation_scheme in ("static", "weight_only"),
        "dynamic_quantization=True contradicts activation_scheme={c.activation_scheme!r}: drop one of them",
    ),
    Rule(
        lambda c: c.activation_scheme == "static" and c.method.dynamic_only,
        "scale_method={c.method.name!r} only exists dynamically: use activation_scheme='dynamic'",
    ),
    Rule(
        lambda c: c.scheme == "dynamic" and not c.method.activation.needs_range,
        "scale_method={c.method.name!r} is a fixed scale, nothing about it is dynamic: use activation_scheme='static', "
        "or a maxabs method",
    ),
    Rule(
        lambda c: c.row_parallel_linear_allreduce_quantization and c.scheme in ("dynamic", "weight_only"),
        "row_parallel_linear_allreduce_quantization=True needs calibrated ranges, but activations are {c.scheme!r}: "
        "use activation_scheme='static', or drop it",
    ),
    Rule(
        lambda c: "input" not in c.measured and c.method.activation.needs_range and _needs_ranges(c),
        "measure_exclude={c.measure_exclude!r} leaves inputs unmeasured, but static activations need their ranges: use "
        "measure_exclude='OUTPUT'",
    ),
]

MODEL_RULES = [
    # An override may ask for weight_only of layers that compute no attention, so this is not asked of modules.
    Rule(
        lambda c: c.attention and c.scheme == "weight_only",
        "attention=True rounds activations, which activation_scheme='weight_only' leaves alone: use 'static' or "
        "'dynamic', or kv_cache=True alone",
    ),
    Rule(
        lambda c: c.dataset is not None and not c.may_be_static,
        "dataset is given, but activations are {c.scheme!r} and need no calibration: drop the dataset, or use "
        "activation_scheme='static'",
    ),
    Rule(
        lambda c: c.mode == "MEASURE" and not c.may_be_static,
        "mode='MEASURE' has nothing to measure for activation_scheme={c.scheme!r}: use mode='AUTO'",
    ),
    Rule(
        lambda c: c.mode == "MEASURE" and not c.measured,
        "mode='MEASURE' has nothing to measure with measure_exclude={c.measure_exclude!r}: use 'OUTPUT'",
    ),
    Rule(
        lambda c: c.mode in ("QUANTIZE", "LOAD") and c.dataset is not None,
        "mode={c.mode!r} does not calibrate, but a dataset is given: use mode='AUTO', or drop the dataset",
    ),
    Rule(
        lambda c: c.fold_batch_norm and c.calibration == "sequential",
        "fold_batch_norm=True needs the weights in memory, which calibration='sequential' keeps on disk: use "
        "calibration='whole'",
    ),
    Rule(
        lambda c: not c.fake_quant and (c.amax_history_len != 1 or c.freeze_scales_at is not None),
        "amax_history_len={c.amax_history_len} and freeze_scales_at={c.freeze_scales_at} are of quantization-aware "
        "training: say fake_quant=True, or leave them out",
    ),
    Rule(
        lambda c: c.fake_quant and c.wants_attention,
        "fake_quant=True trains layers alone, and attention={c.attention}, kv_cache={c.kv_cache} (or an override) ask "
        "for more: leave attention and kv_cache out",
    ),
    Rule(
        lambda c: c.fake_quant and c.mode != "AUTO",
        "fake_quant=True contradicts mode={c.mode!r}: training observes ranges by itself; leave mode out",
    ),
    Rule(
        lambda c: c.fake_quant and (c.dataset is not None or c.calibration != "whole"),
        "fake_quant=True observes ranges in training, and takes no calibration data: leave dataset and calibration out",
    ),
    Rule(
        lambda c: c.fake_quant and c.observer != "maxabs",
        "fake_quant=True scales by max|x|, not by observer={c.observer!r}: leave observer out",
    ),
    Rule(
        lambda c: c.fake_quant and c.fold_batch_norm,
        "fake_quant=True trains weights, and fold_batch_norm=True folds statistics that are trained with them: train "
        "without fold_batch_norm, or fold them before (torch.nn.utils.fusion)",
    ),
    Rule(
        lambda c: c.fake_quant and c.dequantize,
        "fake_quant=True and dequantize=True contradict each other: leave one of them out",
    ),
    Rule(
        lambda c: c.dequantize and (c.dataset is not None or c.mode == "MEASURE"),
        "dequantize=True loads a high-precision model: it cannot be combined with a dataset or mode='MEASURE'",
    ),
]


def _needs_ranges(config: Any) -> bool:
    return config.activation_scheme == "static" or (config.dataset is not None and config.scheme == "auto")
