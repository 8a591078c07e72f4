"""native_config: the configuration with which a foreign FP8 checkpoint is loaded as a model of ours."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from transformers import AutoConfig

from ...config import KEYS, QUANT_METHOD, FP8Config
from ...errors import FP8CheckpointError, FP8ConfigError, nearest
from ...formats import GAUDI_TARGETS, detect_target
from ...scales.methods import scale_method
from ..folder import read_json
from ..inc import is_incs
from .check import check_found
from .headers import FP8_DTYPES, Files, read_files
from .inc import NAME as INC
from .layers import NONE, Found, Layer, keys_for
from .quanto import MAP_FILE
from .quanto import NAME as QUANTO
from .readers import READERS
from .source import Source, keys_by_name, with_source

_CONFIG, _MODELOPT = "config.json", "hf_quant_config.json"
_CACHED = {"kv_cache": True, "activation_scheme": "static", "scale_method": "full_range"}
_LISTS = ("modules_to_not_convert", "allowlist", "blocklist", "overrides")
_DECIDED = (*_LISTS, "fp8_config", "mode", "dataset", "target")  # by the tensors of a checkpoint: nobody may choose


def native_config(path: str | os.PathLike[str], target: str | None = None, **overrides: Any) -> Any:
    """The configuration of transformers with which a checkpoint in another FP8 format is loaded, and run in FP8.

        config = native_config(path)
        model = AutoModelForCausalLM.from_pretrained(path, config=config)

    The model is one of ours: no weight is dequantized, and `save_pretrained` writes our format. What the format has and
    this package does not read is an error; nothing is left out silently.

    Args:
        path: the folder of the checkpoint, with `config.json` and its weights in safetensors.
        target: hardware whose numerics apply, as of FP8Config; None: this machine's.
        overrides: keys of FP8Config that a checkpoint does not tell, such as `hp_dtype` (by default "fp32", in which
            engines compute dynamic scales) or `kv_cache=False` (leaves calibrated scales of caches unread).

    Returns:
        the model's configuration, for `from_pretrained(path, config=…)`.

    Raises:
        FP8CheckpointError: a format that is not read, or tensors that are not what the configuration says; the message
            names the quant_method, the field or tensor, what was found and what is supported.
        FP8ConfigError: a key that the checkpoint decides, or that there is not.
    """
    folder = os.fspath(path)
    if not os.path.isfile(os.path.join(folder, _CONFIG)):
        raise FP8CheckpointError(
            f"{folder} has no {_CONFIG}: expected the folder of a checkpoint; one on the Hub has to be downloaded "
            "first, with huggingface_hub.snapshot_download"
        )
    for key in overrides:
        if key in _DECIDED or key not in KEYS:
            decided = "is decided by the checkpoint" if key in KEYS else f"is unknown: {nearest(key, KEYS)}"
            raise FP8ConfigError(f"native_config: {key!r} {decided}")
    method, said = _said(folder)
    files = read_files(folder)
    found = READERS[method](said, files)
    if overrides.get("kv_cache") is False:
        keys = {key for cache in found.caches.values() for key in cache.keys.values()}
        found = replace(found, caches={}, unread=found.unread | keys)
    check_found(method, found, files)
    config = AutoConfig.from_pretrained(folder)
    for part in (config, config.get_text_config(decoder=True)):
        getattr(part, "__dict__", {}).pop("quantization_config", None)
    config.quantization_config = _config(method, found, files, target, overrides)
    return config


def _said(folder: str) -> tuple[str, dict[str, Any]]:
    """The quant_method of a folder, and all that is said of the quantization."""
    config = read_json(os.path.join(folder, _CONFIG))
    said = config.get("quantization_config") or (config.get("text_config") or {}).get("quantization_config")
    said = said or config.get("compression_config")
    other = os.path.join(folder, _MODELOPT)
    if not said and os.path.isfile(other):
        said = {"quant_method": "modelopt", **read_json(other)}
    quanto = os.path.join(folder, MAP_FILE)
    if not said and os.path.isfile(quanto):
        said = {"quant_method": QUANTO, "modules": read_json(quanto)}
    if isinstance(said, Mapping) and is_incs(said):
        said = {**said, "quant_method": INC}
    if not isinstance(said, Mapping):
        raise FP8CheckpointError(
            f"{folder} does not say how it is quantized: expected 'quantization_config' in {_CONFIG}, {_MODELOPT} or "
            f"{MAP_FILE}"
        )
    method = str(said.get("quant_method"))
    if method == QUANT_METHOD:
        raise FP8CheckpointError(f"{folder} is a checkpoint of optimum_fp8: load it with from_pretrained({folder!r})")
    if method not in READERS:
        raise FP8CheckpointError(
            f"{folder}: quant_method={said.get('quant_method')!r} is not read: expected {', '.join(sorted(READERS))}"
        )
    return method, dict(said)


def _config(method: str, found: Found, files: Files, target: str | None, overrides: Mapping[str, Any]) -> FP8Config:
    keys = {name: _keys(method, name, layer, files, overrides) for name, layer in found.layers.items()}
    by_head = "head" if found.by_head else "tensor"
    cached = {**_CACHED, "attention_granularity": by_head}
    source = Source(method, files, found, keys, cached)
    counts = Counter(repr(sorted(each.items())) for each in keys.values())
    most = max(keys.values(), key=lambda each: counts[repr(sorted(each.items()))])
    # Which half of the codes a target can hold is looked at while loading: all makers use the range of 448.
    here = detect_target()
    common = {"hp_dtype": "fp32", **overrides, **most, "target": "cpu" if here in GAUDI_TARGETS else here}
    config = FP8Config(**{**common, **keys_by_name(source, common, {})})
    if target is not None:
        config.__dict__["_requested"] = {"target": FP8Config(target=target).target}
    return with_source(config, source)


def _keys(method: str, name: str, layer: Layer, files: Files, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of one layer, with those that may be chosen: other rules for what is rounded at run time."""
    keys = keys_for(name, layer, method)
    codes = FP8_DTYPES[files.headers[layer.keys["weight"]].dtype]
    if codes != "E4M3" and layer.inputs != NONE:
        raise FP8CheckpointError(
            f"quant_method={method!r}: {name}.weight is in {codes} and its input is rounded too (by {layer.inputs}), "
            "in which format is not said: weights in E5M2 are read where inputs are not rounded"
        )
    chosen = {key: value for key, value in overrides.items() if key in keys}
    before = scale_method(keys["scale_method"]).weight.granularity
    after = scale_method(chosen.get("scale_method", keys["scale_method"])).weight.granularity
    if before != after:
        raise FP8ConfigError(
            f"native_config: scale_method={chosen['scale_method']!r} has weights scaled {after}, but those of {name} "
            f"are scaled {before}: choose a method that differs in what is rounded at run time alone"
        )
    return {**keys, **chosen, "fp8_config": codes}
