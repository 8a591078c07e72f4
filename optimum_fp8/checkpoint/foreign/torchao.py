"""The format of torchao in safetensors: `X._weight_qdata` and `X._weight_scale`, described in the files' metadata."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .headers import Files
from .layers import CHANNEL, NONE, PER_TENSOR, TENSOR, TOKEN, Found, Layer, not_read
from .readers import coded_modules, keys_of, register_reader

NAME = "torchao"
_NAMES = {"weight": ["_weight_qdata"], "weight_scale": ["_weight_scale"]}
_INPUTS = {"PerRow": TOKEN, "PerTensor": PER_TENSOR}


@register_reader(NAME)
def read(said: Mapping[str, Any], files: Files) -> Found:
    """What a checkpoint in this format holds: the metadata says it of each tensor, and wins over the configuration."""
    return Found({name: _layer(name, files) for name in coded_modules(files, "_weight_qdata")})


def _layer(name: str, files: Files) -> Layer:
    place = f"the metadata of {name}.weight"
    told = files.json_in_metadata(f"{name}.weight")
    if not isinstance(told, Mapping) or told.get("_type") != "Float8Tensor":
        raise not_read(NAME, place, told, "a Float8Tensor")
    data = told.get("_data") or {}
    out, size = (*files.headers[f"{name}._weight_qdata"].shape, 0, 0)[:2]
    blocks = data.get("block_size")
    known = {(1, size): CHANNEL, (out, size): TENSOR, (): TENSOR}
    if not isinstance(blocks, list) or tuple(blocks) not in known:
        raise not_read(NAME, f"{place}: block_size", blocks, f"[1, {size}] or [{out}, {size}]")
    inputs = NONE
    if (given := data.get("act_quant_kwargs")) is not None:
        kwargs = given.get("_data", {}) if isinstance(given, Mapping) else {}
        granularity = (kwargs.get("granularity") or {}).get("_type")
        bounds = [kwargs.get(each) for each in ("hp_value_lb", "hp_value_ub")]
        dtype = (kwargs.get("float8_dtype") or {}).get("_data", "float8_e4m3fn")
        if granularity not in _INPUTS or bounds != [None, None] or dtype != "float8_e4m3fn":
            supported = "a granularity PerRow or PerTensor in float8_e4m3fn, without bounds"
            raise not_read(NAME, f"{place}: act_quant_kwargs", given, supported)
        inputs = _INPUTS[granularity]
    return Layer(known[tuple(blocks)], inputs, keys_of(files, name, _NAMES))
