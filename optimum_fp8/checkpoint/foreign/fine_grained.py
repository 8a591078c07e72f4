"""The format `fp8`: DeepSeek's and transformers' with `X.weight_scale_inv`, a multiplier all the same, and vLLM's, one
scale for a tensor as `X.weight_scale` and `X.input_scale`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...errors import FP8CheckpointError
from ..finegrained_fp8 import NAME
from .headers import Files
from .layers import (
    BY_BLOCK,
    GROUP_32,
    GROUP_128,
    GROUP_128_E8M0,
    MX,
    STATIC,
    TENSOR,
    TOKEN,
    Found,
    Layer,
    check_fields,
    not_read,
)
from .readers import calibrated_caches, coded_modules, keys_of, refuse_excluded, register_reader

_FIELDS: dict[str, tuple[Any, ...] | None] = {
    "quant_method": (NAME, "mxfp8"),
    "activation_scheme": ("dynamic", "static"),
    "weight_block_size": None,
    "modules_to_not_convert": None,
    "ignored_layers": None,
    "modules_to_convert": (None, []),
    "scale_fmt": ("float", "ue8m0", None),
    "expert_dtype": ("fp8", None),
    "dequantize": (False,),
    "fmt": ("e4m3", None),
    "store_dtype": None,
    "kv_cache_scheme": None,
    "kv_cache_quant_method": None,
}
_NAMES = {
    "weight": ["weight"],
    "weight_scale": ["weight_scale_inv", "weight_scale", "scale", "qscale_weight"],
    "input_scale": ["activation_scale", "input_scale", "qscale_act"],
}


@register_reader(NAME, "mxfp8")
def read(said: Mapping[str, Any], files: Files) -> Found:
    """What a checkpoint in this format holds."""
    fields = check_fields(NAME, "quantization_config", said, _FIELDS)
    weights, inputs = _scheme(fields)
    names = coded_modules(files)
    for place in ("modules_to_not_convert", "ignored_layers"):
        refuse_excluded(NAME, place, fields.get(place), names)
    layers = {name: Layer(weights, inputs, keys_of(files, name, _NAMES)) for name in names}
    if not any(key.endswith(("k_scale", "v_scale", "_proj.output_scale")) for key in files.headers):
        return Found(layers)
    return Found(layers, calibrated_caches(NAME, "a k_scale in the files", files))


def _scheme(fields: Mapping[str, Any]) -> tuple[str, str]:
    size, exponents = fields.get("weight_block_size"), fields.get("scale_fmt") == "ue8m0"
    static = fields.get("activation_scheme", "dynamic") == "static"
    if fields.get("quant_method") == "mxfp8" and size is None:
        size, exponents = [1, 32], True
    if size is None:
        return TENSOR, STATIC if static else TOKEN
    if static:
        raise FP8CheckpointError(
            f"quant_method={NAME!r}: activation_scheme='static' with weight_block_size={size}, which is not read: "
            "expected activation_scheme='dynamic' where weights have blocks"
        )
    if list(size) == [128, 128]:
        return BY_BLOCK, GROUP_128_E8M0 if exponents else GROUP_128
    if list(size) == [1, 32] and exponents:
        return MX, GROUP_32
    raise not_read(NAME, "weight_block_size", size, "[128, 128], [1, 32] with scale_fmt='ue8m0', or null")
