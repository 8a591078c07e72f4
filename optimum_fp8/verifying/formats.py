"""What FP8 checkpoints of the known methods consist of: names of scales, which inputs have one, what is left out."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

OURS = "optimum_fp8"
WEIGHT_SCALES = ("weight_scale", "weight_scale_inv", "scale_weight", "scale")
INPUT_SCALES = ("input_scale", "activation_scale", "scale_input", "input_activation_scale")
_BLOCKS = (16, 32, 64, 128, 256, 512)  # sizes of blocks and groups that are in use
_BLOCK = 128  # of those whose last may be smaller
MODELOPT = "modelopt"
_LISTS = ("ignore", "modules_to_not_convert", "ignored_layers", "exclude_modules")
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"), ("query", "key", "value"))


@dataclass(frozen=True)
class Rules:
    """What the configuration of a checkpoint says of its tensors.

    Attributes:
        weight_scales: how the scale of a weight may be called below its module.
        static: whether each layer has a scale of its input.
        block: rows and columns of a block with one scale; None: no blocks, or it is not said.
        left_out: names and patterns of what stays in high precision.
        caches: whether attention has scales of its cache.
    """

    weight_scales: tuple[str, ...]
    static: bool
    block: tuple[int, int] | None
    left_out: tuple[str, ...]
    caches: bool = False


def rules_of(said: Mapping[str, Any]) -> Rules:
    """The rules of a `quantization_config`; of a method that is not known, those that hold for all."""
    left_out = next((tuple(map(str, said[key])) for key in _LISTS if isinstance(said.get(key), list)), ())
    method = said.get("quant_method")
    if method == "compressed-tensors":
        return _compressed_tensors(said, left_out)
    if method == "fp8":
        block = said.get("weight_block_size")
        names = ("weight_scale_inv",) if block else ("weight_scale_inv", "weight_scale")
        return Rules(names, said.get("activation_scheme") == "static", tuple(block) if block else None, left_out)
    if method == MODELOPT:
        static = said.get("quant_algo", "FP8") == "FP8"
        caches = str(said.get("kv_cache_quant_algo")).upper() == "FP8"
        block = (_BLOCK, _BLOCK) if said.get("quant_algo") == "FP8_PB_WO" else None
        return Rules(("weight_scale",), static, block, left_out, caches)
    if method in ("fbgemm_fp8", OURS):
        return Rules(("weight_scale",), False, None, left_out)
    return Rules(WEIGHT_SCALES, False, None, left_out)


def _compressed_tensors(said: Mapping[str, Any], left_out: tuple[str, ...]) -> Rules:
    groups = said.get("config_groups")
    each = [group for group in groups.values() if isinstance(group, dict)] if isinstance(groups, dict) else []
    inputs = [group.get("input_activations") or {} for group in each]
    static = bool(inputs) and all(group and not group.get("dynamic") for group in inputs)
    blocks = [(group.get("weights") or {}).get("block_structure") for group in each]
    block = tuple(blocks[0]) if len(blocks) == 1 and isinstance(blocks[0], list) else None
    return Rules(("weight_scale",), static, block, left_out, bool(said.get("kv_cache_scheme")))


def is_left_out(module: str, patterns: Collection[str]) -> bool:
    """Whether a module is in a list of exceptions: by its name, a part of it, or a pattern, as engines read them."""
    for pattern in patterns:
        if pattern.startswith("re:"):
            if re.match(pattern[3:], module):
                return True
        elif "*" in pattern:
            if fnmatch.fnmatchcase(module, pattern):
                return True
        elif f".{pattern}." in f".{module}.":
            return True
    return False


def without_unit_axes(scale: tuple[int, ...]) -> tuple[int, ...]:
    """The shape `[rows, columns]` of a scale by blocks, which ModelOpt writes as `[rows, 1, columns, 1]`; or as is."""
    return scale[::2] if len(scale) == 4 and scale[1::2] == (1, 1) else scale


def block_size(size: int, count: int) -> int | None:
    """How many values share a scale, where `count` scales cover an axis of `size`; None: no size that is in use."""
    evenly = -(-size // count)
    if evenly in _BLOCKS:
        return evenly
    return _BLOCK if -(-size // _BLOCK) == count else None


def fits(codes: tuple[int, ...], scale: tuple[int, ...], block: tuple[int, int] | None) -> bool:
    """Whether a scale may belong to codes `[out, in]`, `[out, in, …]` or stacked `[experts, out, in]`, by its shape."""
    count = 1
    for size in scale:
        count *= size
    if count == 1 and block is None:
        return True
    if not codes or not count or len(scale) > len(codes):
        return False
    if block is not None and len(codes) >= 2:
        rows, columns = codes[-2:]
        wanted = (*codes[:-2], -(-rows // block[0]), -(-columns // block[1]))
        return scale == wanted
    halves = (1, 2) if len(codes) > 2 else (1,)  # experts: gate and up below each other
    return bool(scale) and all(
        found in (*(halves if axis == 1 else (1,)), size) or block_size(size, found) is not None
        for axis, (size, found) in enumerate(zip(codes, scale, strict=False))
    )
