"""Presets: the schemes of published FP8 checkpoints, by the names that their makers use."""

from __future__ import annotations

from typing import Any

from ..errors import FP8ConfigError, nearest

# What compressed-tensors, vLLM and others call a scheme, and the keys that make it.
PRESETS: dict[str, dict[str, Any]] = {
    "FP8": {"scale_method": "full_range", "activation_scheme": "static"},
    "FP8_DYNAMIC": {"scale_method": "full_range_pcs", "activation_scheme": "dynamic"},
    "FP8_BLOCK": {"scale_method": "block_128", "activation_scheme": "dynamic"},
    "MXFP8": {"scale_method": "mxfp8", "activation_scheme": "dynamic", "hp_dtype": "fp32"},
    "W8A16": {"scale_method": "full_range_pcs", "activation_scheme": "weight_only"},
}


def preset(name: str) -> dict[str, Any]:
    """The keys of the preset called `name` (any case).

    Raises:
        FP8ConfigError: there is none; the message names the nearest.
    """
    found = PRESETS.get(str(name).upper())
    if found is None:
        raise FP8ConfigError(f"the preset {name!r} is unknown: {nearest(str(name).upper(), PRESETS)}")
    return dict(found)
