"""The keys of FP8Config that `requantize` takes: the command line lists them, so this file may not import torch."""

from __future__ import annotations

from .keys import KEYS

_CHOOSING = ("attention", "kv_cache", "quantize_", "row_parallel_")  # beginnings of keys that say what is in FP8
_NOT_THERE = ("dump_stats_path", "calibration_inputs")

OF_SCALES = [name for name, key in KEYS.items() if key.of_module and not name.startswith(_CHOOSING)] + ["target"]
OF_MEASURING = [name for name, key in KEYS.items() if key.of_data and name not in _NOT_THERE]
OF_MEASURING += ["decode_steps", "observer", "percentile"]
