"""Source: what the quantizer has to know of a foreign checkpoint's tensors, carried by the FP8Config made for it."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ...attention import CHILD
from ...config import FP8Config
from ...errors import FP8CheckpointError
from .check import scale_shape
from .headers import Files
from .layers import STATIC, Found

_ATTRIBUTE = "_source"
# An expert of those that transformers stacks: its part of the name says nothing of how the stack is scaled.
_EXPERT = re.compile(r"(.+\.experts)\.\d+\.\w+$")

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True, eq=False)
class Source:
    """A foreign checkpoint as it is on disk.

    Attributes:
        method: its quant_method.
        files: the headers of its files.
        found: the layers and caches in FP8.
        keys: the keys of FP8Config that ask for each layer's scheme, by its name in the files.
        cache_keys: those that ask for an attention module's cache.
    """

    method: str
    files: Files
    found: Found
    keys: Mapping[str, Mapping[str, Any]]
    cache_keys: Mapping[str, Any]

    def __deepcopy__(self, memo: dict[int, Any]) -> Source:
        return self  # it is never changed, and transformers copies configurations often

    @cached_property
    def renamed(self) -> dict[str, str]:
        """The names that tensors of the files get, by those that they have there, where they are others."""
        names = {key: f"{name}.{ours}" for name, layer in self.found.layers.items() for ours, key in layer.keys.items()}
        names |= {
            key: f"{name}.{CHILD}.{ours}"
            for name, cache in self.found.caches.items()
            for ours, key in cache.keys.items()
        }
        return {key: name for key, name in names.items() if key != name}

    @cached_property
    def shapes(self) -> Shapes:
        """The shapes that all tensors have as we store them, by the names that they get."""
        shapes = {
            self.renamed.get(key, key): header.shape
            for key, header in self.files.headers.items()
            if key not in self.found.unread
        }
        for name, layer in self.found.layers.items():
            weight = layer.shape(self.files.headers[layer.keys["weight"]].shape)
            shapes[f"{name}.weight"] = (1, *weight)
            shapes[f"{name}.weight_scale"] = scale_shape(layer.weights, weight)
            if layer.inputs == STATIC:
                shapes[f"{name}.input_scale"] = (1,)
        for name, cache in self.found.caches.items():
            for ours, key in cache.keys.items():
                size = self.files.headers[key].shape
                heads = max((*size, 1))
                shapes[f"{name}.{CHILD}.{ours}"] = (heads, 1, 1) if self.found.by_head else (1,)
        return shapes

    @cached_property
    def plain(self) -> list[str]:
        """The names of modules whose weights are in high precision."""
        return sorted(
            key.removesuffix(".weight")
            for key, header in self.files.headers.items()
            if key.endswith(".weight") and not header.is_fp8
        )

    def check_files(self, paths: Sequence[str] | None) -> None:
        """Refuse to load other files than those that the configuration was made of.

        Raises:
            FP8CheckpointError: names the folder.
        """
        own = {os.path.realpath(header.path) for header in self.files.headers.values()}
        if {os.path.realpath(path) for path in paths or ()} != own:
            raise FP8CheckpointError(
                f"native_config was called for {self.files.folder}, but other files are loaded "
                f"({', '.join(map(str, paths or ())) or 'none'}): call it with the folder that from_pretrained is given"
            )


def source_of(config: FP8Config) -> Source | None:
    """The foreign checkpoint that a configuration was made for; None: it is of a checkpoint of our own, or of none."""
    found: Source | None = config.__dict__.get(_ATTRIBUTE)
    return found


def with_source(config: FP8Config, source: Source) -> FP8Config:
    """The configuration itself, which from now on carries a source until it is copied with other keys."""
    config.__dict__[_ATTRIBUTE] = source
    return config


def keys_by_name(source: Source, common: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """What a configuration says of single modules: `overrides` and `modules_to_not_convert`.

    Args:
        source: the checkpoint.
        common: the keys that hold where nothing else is said.
        names: what modules are called in the model, by their names in the files, where they are called otherwise.

    Raises:
        FP8CheckpointError: experts of one stack that are scaled in different ways.
    """
    by_module: dict[str, Mapping[str, Any]] = {}
    for name, keys in source.keys.items():
        module = names.get(name, name)
        stack = _EXPERT.sub(r"\1", module)
        if by_module.setdefault(stack, keys) != keys:
            raise FP8CheckpointError(
                f"quant_method={source.method!r}: {name} is scaled as {dict(keys)}, and others of {stack} as "
                f"{dict(by_module[stack])}: experts of one layer are read where all are scaled alike"
            )
    by_module |= {names.get(name, name): source.cache_keys for name in source.found.caches}
    groups: dict[str, tuple[dict[str, Any], list[str]]] = {}
    for module, keys in by_module.items():
        differing = {key: value for key, value in keys.items() if common.get(key) != value}
        if differing:
            groups.setdefault(repr(differing), (differing, []))[1].append(re.escape(module))
    overrides = {rf"^(?:{'|'.join(each)})(?:\.\d+\.\w+)?$": differing for differing, each in groups.values()}
    return {"overrides": overrides, "modules_to_not_convert": [names.get(name, name) for name in source.plain]}
