"""The folders that Intel Neural Compressor saves: `X.weight` `[in, out]`, and scales named after INC's helper modules;
the configuration is INC's own."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ...errors import FP8CheckpointError
from ...scales import SCALE_METHODS
from .headers import Files
from .layers import CHANNEL, STATIC, TENSOR, Found, Layer, not_read
from .readers import coded_modules, keys_of, register_reader

NAME = "inc"
_NAMES = {
    "weight": ["weight"],
    "weight_scale": ["dequant_weights.scale", "scale_weight"],
    "input_scale": ["quant_input.scale", "scale_input"],
}
# The reciprocal of a scale that is there, and a zero point, which FP8 has none of: both follow from the rest.
_DERIVED = ("quant_input.scale_inv", "quant_input.zero_point", "dequant_weights.zero_point")
_OF_HELPERS = re.compile(r".*\.(?:(?:de)?quant_\w+\.\w+|scale_\w+)$")
_OF_A_RANK = re.compile(r".*_\d+_\d+$")


@register_reader(NAME)
def read(said: Mapping[str, Any], files: Files) -> Found:
    """What such a folder holds: linear layers with static inputs; attention and caches are not read."""
    flags = {key: str(said.get(key)).lower() == "true" for key in ("dynamic_quantization", "use_qdq", "fake_quant")}
    method = said["scale_method"]
    if flags["dynamic_quantization"] or flags["fake_quant"]:
        raise not_read(NAME, "dynamic_quantization or fake_quant", True, "False")
    if not isinstance(method, str) or method.lower() not in SCALE_METHODS:
        raise not_read(NAME, "scale_method", method, "the name of one of INC's methods")
    options = {"scale_method": method.lower(), "hp_dtype": said.get("hp_dtype", "bf16"), "use_qdq": flags["use_qdq"]}
    layers = {}
    for name in coded_modules(files):
        keys = keys_of(files, name, _NAMES)
        scale = files.headers.get(keys.get("weight_scale", ""))
        weights = CHANNEL if scale is not None and max((*scale.shape, 1)) > 1 else TENSOR
        layers[name] = Layer(weights, STATIC, keys, transposed=True, options=options)
    unread = {f"{name}.{leaf}" for name in layers for leaf in _DERIVED} & set(files.headers)
    taken = {key for layer in layers.values() for key in layer.keys.values()} | unread
    for key in files.headers:
        if key not in taken and (_OF_HELPERS.match(key) or _OF_A_RANK.match(key)):
            raise FP8CheckpointError(
                f"quant_method={NAME!r}: {key} is not read: expected linear layers with static inputs, saved by one "
                "process; attention, caches and parts of other ranks are not read, quantize the original model"
            )
    return Found(layers, unread=frozenset(unread))
