"""The format compressed-tensors, in which llm-compressor and others publish: `X.weight` in FP8, `X.weight_scale`,
`X.input_scale` where it is static, and `Y.k_scale` and `Y.v_scale` of attention modules."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from ...errors import FP8CheckpointError
from ..compressed_tensors import NAME
from .check import zero_points
from .headers import Files
from .layers import (
    BY_BLOCK,
    CHANNEL,
    GROUP_32,
    GROUP_128,
    MX,
    NONE,
    PER_TENSOR,
    STATIC,
    TENSOR,
    TOKEN,
    Found,
    Layer,
    check_fields,
    not_read,
)
from .readers import calibrated_caches, coded_modules, keys_of, refuse_excluded, register_reader

_FORMATS = ("float-quantized", "naive-quantized", "mxfp8-quantized", "mixed-precision")
_FIELDS: dict[str, tuple[Any, ...] | None] = {
    "quant_method": (NAME,),
    "format": (*_FORMATS, None),
    "quantization_status": ("compressed", "frozen", None),
    "config_groups": None,
    "ignore": None,
    "kv_cache_scheme": None,
    "global_compression_ratio": None,
    "version": None,
    "sparsity_config": None,  # looked at by itself
    "transform_config": ({}, None),
    "moe_sparsity_config": ({}, None),
}
_GROUP: dict[str, tuple[Any, ...] | None] = {
    "targets": None,
    "weights": None,
    "input_activations": None,
    "output_activations": (None,),
    "format": (*_FORMATS[:3], None),
}
_ARGUMENTS: dict[str, tuple[Any, ...] | None] = {
    "num_bits": (8,),
    "type": ("float",),
    "symmetric": (True,),
    "strategy": ("tensor", "channel", "block", "group", "token", "attn_head", None),
    "group_size": None,
    "block_structure": None,
    "dynamic": (True, False),
    "actorder": (None,),
    "scale_dtype": None,
    "zp_dtype": None,
    "observer": None,  # how the scales were found
    "observer_kwargs": None,
}
_NAMES = {"weight": ["weight"], "weight_scale": ["weight_scale"], "input_scale": ["input_scale"]}
_LINEAR = "Linear"


@register_reader(NAME)
def read(said: Mapping[str, Any], files: Files) -> Found:
    """What a checkpoint in this format holds."""
    check_fields(NAME, "quantization_config", said, _FIELDS)
    sparsity = said.get("sparsity_config") or {"format": "dense"}
    if not isinstance(sparsity, Mapping) or sparsity.get("format") != "dense":
        raise not_read(NAME, "sparsity_config", sparsity, "the format 'dense', or nothing")
    groups = [
        (place, check_fields(NAME, f"config_groups.{place}", group, _GROUP))
        for place, group in (said.get("config_groups") or {}).items()
    ]
    schemes = {place: (_weights(place, group), _inputs(place, group)) for place, group in groups}
    targets = [(target, place) for place, group in groups for target in _targets(place, group, files)]
    layers, names = {}, coded_modules(files)
    refuse_excluded(NAME, "ignore", said.get("ignore"), names, _means)
    for name in names:
        weights, inputs = schemes[_group_of(name, targets)]
        layers[name] = Layer(weights, inputs, keys_of(files, name, _NAMES))
    scheme = said.get("kv_cache_scheme")
    unread = set(zero_points(files, files.headers, NAME))
    if not scheme:
        return Found(layers, unread=frozenset(unread))
    arguments = check_fields(NAME, "kv_cache_scheme", scheme, _ARGUMENTS)
    if arguments.get("dynamic") or arguments.get("strategy") not in ("tensor", "attn_head", None):
        raise not_read(NAME, "kv_cache_scheme", scheme, "a static scale by tensor or attn_head")
    caches = calibrated_caches(NAME, "kv_cache_scheme", files)
    # The query's scale is for engines whose attention takes it in FP8: here a cache alone leaves it as it is.
    unread |= {f"{name}.q_scale" for name in caches} & set(files.headers)
    return Found(layers, caches, arguments.get("strategy") == "attn_head", frozenset(unread))


def _weights(place: str, group: Mapping[str, Any]) -> str:
    where = f"config_groups.{place}.weights"
    arguments = check_fields(NAME, where, group.get("weights"), _ARGUMENTS)
    strategy, size = arguments.get("strategy") or "tensor", arguments.get("group_size")
    if arguments.get("dynamic"):
        raise not_read(NAME, f"{where}.dynamic", True, "False")
    if strategy == "block" and arguments.get("block_structure") == [128, 128]:
        return BY_BLOCK
    if strategy == "group" and size == 32 and arguments.get("scale_dtype") in ("torch.uint8", "torch.float8_e8m0fnu"):
        return MX
    known = {"tensor": TENSOR, "channel": CHANNEL}
    if strategy not in known or size not in (None, -1):
        blocks = arguments.get("block_structure") if strategy == "block" else size
        supported = "tensor, channel, block of [128, 128], or group of 32 with scale_dtype torch.uint8"
        raise not_read(NAME, f"{where}.strategy", (strategy, blocks), supported)
    return known[strategy]


def _inputs(place: str, group: Mapping[str, Any]) -> str:
    if group.get("input_activations") is None:
        return NONE
    where = f"config_groups.{place}.input_activations"
    arguments = check_fields(NAME, where, group["input_activations"], _ARGUMENTS)
    strategy, dynamic = arguments.get("strategy") or "tensor", arguments.get("dynamic", False)
    found = (strategy, dynamic, arguments.get("group_size") if strategy == "group" else None)
    known = {
        ("tensor", False, None): STATIC,
        ("tensor", True, None): PER_TENSOR,
        ("token", True, None): TOKEN,
        ("group", True, 128): GROUP_128,
        ("group", True, 32): GROUP_32,
    }
    if found not in known:
        supported = "static by tensor; dynamic by tensor, token, or group of 128 or 32"
        raise not_read(NAME, f"{where} (strategy, dynamic, group_size)", found, supported)
    return known[found]


def _targets(place: str, group: Mapping[str, Any], files: Files) -> Sequence[str]:
    targets: Sequence[str] = group.get("targets") or []
    for each in targets:
        named = each.startswith("re:") or "." in each or f"{each}.weight" in files.headers
        if not named and each != _LINEAR:
            raise not_read(NAME, f"config_groups.{place}.targets", each, "'Linear', names of layers, or 're:' patterns")
    return targets


def _means(name: str, target: str) -> bool:
    if target.startswith("re:"):
        return re.match(target[3:], name) is not None
    return target == name


def _group_of(name: str, targets: Sequence[tuple[str, str]]) -> str:
    """The group of a layer: that which names it, else the first whose pattern fits, else that of the class."""
    by_name = [place for target, place in targets if target == name]
    by_pattern = [place for target, place in targets if target.startswith("re:") and _means(name, target)]
    by_class = [place for target, place in targets if target == _LINEAR]
    found = next(iter([*by_name, *by_pattern, *by_class]), None)
    if found is None:
        raise FP8CheckpointError(
            f"quant_method={NAME!r}: {name} is in FP8 in the files, but no group of 'config_groups' has a target for "
            f"it (targets: {', '.join(target for target, _ in targets) or 'none'}): correct the configuration, or copy "
            "the checkpoint again"
        )
    return found
