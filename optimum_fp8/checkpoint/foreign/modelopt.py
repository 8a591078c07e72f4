"""The format of NVIDIA's ModelOpt, whose configuration stands in `config.json` or in `hf_quant_config.json`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .headers import Files
from .layers import (
    BY_BLOCK,
    CHANNEL,
    GROUP_32,
    MX,
    NONE,
    STATIC,
    TENSOR,
    TOKEN,
    Found,
    Layer,
    check_fields,
    not_read,
)
from .readers import calibrated_caches, coded_modules, keys_of, refuse_excluded, register_reader

NAME = "modelopt"
# By the name of the algorithm: how weights and inputs are scaled.
_ALGORITHMS = {
    "FP8": (TENSOR, STATIC),
    "FP8_PER_CHANNEL_PER_TOKEN": (CHANNEL, TOKEN),
    "FP8_PB_WO": (BY_BLOCK, NONE),
    "FP8_BLOCK_SCALES": (BY_BLOCK, NONE),
    "MXFP8": (MX, GROUP_32),
}
_MIXED = "MIXED_PRECISION"
_FIELDS: dict[str, tuple[Any, ...] | None] = {
    "quant_method": (NAME, None),
    "quant_algo": None,
    "ignore": None,
    "exclude_modules": None,
    "kv_cache_scheme": None,
    "kv_cache_quant_algo": ("FP8", None),
    "quantized_layers": None,
    "group_size": (None, 32, 128),
    "config_groups": None,  # says again what quant_algo does
    "producer": None,
    "has_zero_point": (False, None),
    "pre_quant_scale": (False, None),
    "smoothquant_val": (None,),
}
_CACHE: dict[str, tuple[Any, ...] | None] = {"type": ("float",), "num_bits": (8,), "dynamic": (False,)}
_NAMES = {"weight": ["weight"], "weight_scale": ["weight_scale"], "input_scale": ["input_scale"]}


@register_reader(NAME)
def read(said: Mapping[str, Any], files: Files) -> Found:
    """What a checkpoint in this format holds."""
    said = {**said, **said.get("quantization", {})}  # as hf_quant_config.json has it
    said.pop("quantization", None)
    fields = check_fields(NAME, "quantization_config", said, _FIELDS)
    names = coded_modules(files)
    for place in ("ignore", "exclude_modules"):
        refuse_excluded(NAME, place, fields.get(place), names)
    layers = {}
    for name in names:
        place, algorithm = _algorithm(name, fields)
        known = _ALGORITHMS.get(str(algorithm).upper())  # ModelOpt writes some in lower case
        if known is None:
            raise not_read(NAME, place, algorithm, " or ".join([*_ALGORITHMS, _MIXED]))
        layers[name] = Layer(*known, keys_of(files, name, _NAMES))
    if fields.get("kv_cache_scheme") is None and fields.get("kv_cache_quant_algo") is None:
        return Found(layers)
    if fields.get("kv_cache_scheme") is not None:
        check_fields(NAME, "kv_cache_scheme", fields["kv_cache_scheme"], _CACHE)
    return Found(layers, calibrated_caches(NAME, "the scheme of the KV cache", files))


def _algorithm(name: str, fields: Mapping[str, Any]) -> tuple[str, Any]:
    """The algorithm of a layer, and where the configuration says so."""
    if fields.get("quant_algo") != _MIXED:
        return "quant_algo", fields.get("quant_algo")
    place = f"quantized_layers[{name!r}]"
    own = (fields.get("quantized_layers") or {}).get(name)
    return f"{place}.quant_algo", own.get("quant_algo") if isinstance(own, Mapping) else own
