"""transformers models inside a model: each is also saved, and loaded, by itself, with a configuration of its own.

CLIP's text model saved from a whole CLIP, a text model loaded from the checkpoint of a whole CLIP, the encoder and the
decoder that an EncoderDecoderModel is put together of: the configuration of each says what of it is in FP8.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import transformers
from torch import nn

from ..checkpoint.native import carried_config
from ..checkpoint.ranges import known_ranges, ranges_within
from ..config import KEYS, QUANT_METHOD, FP8Config
from ..errors import FP8CheckpointError
from ..lifecycle import FP8State
from ..modules import fp8_modules
from ..modules.handler import find_all
from ..selection import names_in_checkpoint, with_limits
from .saving import mark_as_quantized


def models_inside(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The transformers models inside `model` that hold FP8 modules, with their names and a dot, outer ones first."""
    for name, part in model.named_modules():
        if name and isinstance(part, transformers.PreTrainedModel) and fp8_modules(part):
            yield f"{name}.", part


def config_of_part(state: FP8State, prefix: str, part: nn.Module) -> FP8Config:
    """The configuration with which a part of a converted model is saved by itself; `prefix` is its name and a dot."""
    inside = {each.name.removeprefix(prefix): each for each in state.decisions if each.name.startswith(prefix)}
    config = carried_config(
        with_limits(state.config, list(inside.values())),
        [(each.names, each.types) for each in inside.values() if each.selected],
        [name for name, each in inside.items() if not each.selected],
        type(part).__name__,
    )
    return config.replace(overrides=overrides_by_name(config.overrides, {k: each.names for k, each in inside.items()}))


def overrides_by_name(
    overrides: Mapping[str, dict[str, Any]], names: Mapping[str, Iterable[str]], prefix: str = ""
) -> dict[str, dict[str, Any]]:
    """Overrides for the same modules under other names.

    Args:
        overrides: {pattern: keys}.
        names: what the patterns may call each module, by its name.
        prefix: put in front of the names.
    """
    renamed: dict[str, dict[str, Any]] = {}
    for pattern, keys in overrides.items():
        meant = [
            re.escape(f"{prefix}{name}") for name, known in names.items() if any(re.search(pattern, n) for n in known)
        ]
        if meant:
            renamed[f"^(?:{'|'.join(meant)})$"] = keys
    return renamed


def adopt_parts(model: Any, config: FP8Config) -> None:
    """Complete the configuration of a checkpoint whose model was put together of FP8 models, in place.

    transformers takes the configuration of the text model, or of the decoder, where the whole has none.

    Raises:
        FP8CheckpointError: the parts were quantized in different ways.
    """
    parts_said = [_config_in(value) for value in vars(model.config).values()]
    if not any(_is_same(found, config) for found in parts_said if found is not None):
        return  # it is the model's own
    parts: dict[str, Any] = {}
    for name, part in model.named_modules():
        inside = any(name.startswith(prefix) for prefix in parts)
        if name and not inside and isinstance(part, transformers.PreTrainedModel) and _config_in(part.config):
            parts[f"{name}."] = part
    left_out: list[str] = []
    overrides: dict[str, dict[str, Any]] = {}
    candidates = find_all(model)
    for prefix, part in parts.items():
        own = _config_in(part.config)
        assert own is not None
        if _method(own) != _method(config):
            raise FP8CheckpointError(
                f"{prefix[:-1]} was quantized in another way than the rest ({own}, and {config}): load each by itself"
            )
        left_out += [f"{prefix}{name}" for name in own.modules_to_not_convert or []]
        base = f"{part.base_model_prefix}."
        names = [name.removeprefix(prefix) for name in candidates if name.startswith(prefix)]
        overrides |= overrides_by_name(own.overrides, {name: names_in_checkpoint(name, base) for name in names}, prefix)
    config.modules_to_not_convert = left_out + [name for name in candidates if not name.startswith(tuple(parts))]
    config.overrides = overrides


def _config_in(config: Any) -> FP8Config | None:
    """The FP8 configuration that a model's configuration carries, or None."""
    found = getattr(config, "quantization_config", None)
    if isinstance(found, dict) and found.get("quant_method") == QUANT_METHOD:
        found = FP8Config.from_dict(found)
    return found if isinstance(found, FP8Config) else None


def _method(config: FP8Config) -> dict[str, Any]:
    """What the configuration says of how modules are quantized, but for single ones."""
    return {name: getattr(config, name) for name, key in KEYS.items() if key.of_module}


def _is_same(one: FP8Config, other: FP8Config) -> bool:
    return _method(one) == _method(other) and one.model_class == other.model_class


def attach_to_parts(model: nn.Module, state: FP8State, quantizer_class: type[Any]) -> None:
    """Give the transformers models inside a converted model what they need to be saved, and loaded, by themselves."""
    known = {id(model.config)} if isinstance(model, transformers.PreTrainedModel) else set()
    parts = list(models_inside(model))
    ranges = known_ranges(model) if parts else {}
    for prefix, part in parts:  # what shares its configuration with what is around it is saved with that
        config = part.config.quantization_config if id(part.config) in known else config_of_part(state, prefix, part)
        known.add(id(part.config))
        mark_as_quantized(part, config, state)
        part.hf_quantizer = quantizer_class(config, pre_quantized=True)
        part.hf_quantizer._told = {"ranges": ranges_within(ranges, prefix), "provenance": state.provenance}
