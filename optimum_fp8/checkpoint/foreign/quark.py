"""The format of AMD's Quark: `X.weight`, `X.weight_scale`, `X.input_scale`, and the scales of caches as outputs of
`k_proj` and `v_proj`."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatch
from typing import Any

from .check import zero_points
from .headers import Files
from .layers import CHANNEL, NONE, PER_TENSOR, STATIC, TENSOR, TOKEN, Found, Layer, check_fields, not_read
from .readers import calibrated_caches, coded_modules, keys_of, refuse_excluded, register_reader

NAME = "quark"
_FIELDS: dict[str, tuple[Any, ...] | None] = {
    "quant_method": (NAME,),
    "global_quant_config": None,
    "layer_quant_config": None,
    "layer_type_quant_config": ({}, None),
    "kv_cache_quant_config": None,
    "exclude": None,
    "algo_config": None,  # how the weights were changed before
    "softmax_quant_spec": (None,),
    "kv_cache_post_rope": (False, None),
    "quant_mode": None,
    "version": None,
    "export": None,  # how it was written
}
_PARTS: dict[str, tuple[Any, ...] | None] = {
    "weight": None,
    "input_tensors": None,
    "output_tensors": None,
    "bias": (None,),
    "target_device": None,
}
_SPEC = {"dtype", "qscheme", "is_dynamic", "symmetric"}
_NAMES = {"weight": ["weight"], "weight_scale": ["weight_scale"], "input_scale": ["input_scale"]}


@register_reader(NAME)
def read(said: Mapping[str, Any], files: Files) -> Found:
    """What a checkpoint in this format holds."""
    fields = check_fields(NAME, "quantization_config", said, _FIELDS)
    layers, cached = {}, bool(fields.get("kv_cache_quant_config"))
    names = coded_modules(files)
    refuse_excluded(NAME, "exclude", fields.get("exclude"), names, fnmatch)
    for name in names:
        place, parts = _parts_of(name, fields)
        if parts.get("output_tensors") is not None:
            if not name.endswith(("k_proj", "v_proj")) or _spec(place, "output_tensors", parts) != (
                "per_tensor",
                False,
            ):
                supported = "static per_tensor for k_proj and v_proj, whose outputs are cached"
                raise not_read(NAME, f"{place}.output_tensors of {name}", parts["output_tensors"], supported)
            cached = True
        layers[name] = Layer(_weights(place, parts), _inputs(place, parts), keys_of(files, name, _NAMES))
    unread = zero_points(files, files.headers, NAME)
    caches = calibrated_caches(NAME, "kv_cache_quant_config", files) if cached else {}
    return Found(layers, caches, unread=unread)


def _parts_of(name: str, fields: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """What is said of a layer: of the first pattern that means it, else of all."""
    of_layers = fields.get("layer_quant_config") or {}
    pattern = next((pattern for pattern in of_layers if fnmatch(name, pattern)), None)
    place = "global_quant_config" if pattern is None else f"layer_quant_config[{pattern!r}]"
    said = fields.get("global_quant_config") if pattern is None else of_layers[pattern]
    return place, check_fields(NAME, place, said, _PARTS)


def _spec(place: str, part: str, parts: Mapping[str, Any]) -> tuple[Any, bool]:
    """How a part is scaled, and whether by its own range."""
    spec = parts[part]
    if not isinstance(spec, Mapping) or not spec.keys() >= _SPEC - {"symmetric"}:
        raise not_read(NAME, f"{place}.{part}", spec, f"an object with {', '.join(sorted(_SPEC))}")
    if spec["dtype"] != "fp8_e4m3" or spec.get("symmetric") is False or spec.get("is_scale_quant"):
        raise not_read(NAME, f"{place}.{part}", dict(spec), "dtype 'fp8_e4m3', symmetric")
    return spec["qscheme"], bool(spec["is_dynamic"])


def _weights(place: str, parts: Mapping[str, Any]) -> str:
    found = _spec(place, "weight", parts)
    known = {("per_tensor", False): TENSOR, ("per_channel", False): CHANNEL}
    if found not in known or (known[found] == CHANNEL and parts["weight"].get("ch_axis") not in (0, None)):
        raise not_read(NAME, f"{place}.weight", parts["weight"], "per_tensor, or per_channel along ch_axis 0")
    return known[found]


def _inputs(place: str, parts: Mapping[str, Any]) -> str:
    if parts.get("input_tensors") is None:
        return NONE
    found = _spec(place, "input_tensors", parts)
    known = {("per_tensor", False): STATIC, ("per_tensor", True): PER_TENSOR, ("per_channel", True): TOKEN}
    if found not in known:
        supported = "per_tensor, or dynamic per_channel, which is a scale each token"
        raise not_read(NAME, f"{place}.input_tensors", parts["input_tensors"], supported)
    return known[found]
