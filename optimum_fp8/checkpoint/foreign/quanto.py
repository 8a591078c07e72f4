"""The format of optimum-quanto: `X.weight._data` and `X.weight._scale`, listed in `quanto_qmap.json`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .headers import Files
from .layers import CHANNEL, NONE, Found, Layer, check_fields, not_read
from .readers import coded_modules, keys_of, register_reader

NAME = "quanto"
MAP_FILE = "quanto_qmap.json"
_FLOATS = ("qfloat8", "qfloat8_e4m3fn", "qfloat8_e5m2")
_NAMES = {"weight": ["weight._data"], "weight_scale": ["weight._scale"]}


@register_reader(NAME)
def read(said: Mapping[str, Any], files: Files) -> Found:
    """What a checkpoint in this format holds; `said` is what `quanto_qmap.json` says, under "modules"."""
    modules: Mapping[str, Any] = said["modules"]
    for name, each in modules.items():
        fields = check_fields(NAME, f"{MAP_FILE}[{name!r}]", each, {"weights": None, "activations": None})
        if fields.get("weights") not in _FLOATS:
            raise not_read(NAME, f"{MAP_FILE}[{name!r}].weights", fields.get("weights"), " or ".join(_FLOATS))
        if fields.get("activations") not in ("none", None):
            # quanto rounds the outputs of layers as well, in the type of the inputs.
            raise not_read(NAME, f"{MAP_FILE}[{name!r}].activations", fields["activations"], "'none'")
    names = [*modules, *(name for name in coded_modules(files, "weight._data") if name not in modules)]
    layers = {name: Layer(CHANNEL, NONE, keys_of(files, name, _NAMES)) for name in names}
    # Of activations that are not rounded they are ones, and nothing is multiplied by them.
    unused = {f"{name}.{part}_scale" for name in modules for part in ("input", "output")}
    return Found(layers, unread=frozenset(unused & set(files.headers)))
