"""`scale_method` as Intel Neural Compressor's dict: other rules for some modules, and free backoffs.

    {"default": {"weight": {…}, "activation": {…}},
     "nodes": {"model.layers.0.mlp.up_proj": {…}}, "layers": {"3": {…}}, "layer_types": {"Linear": {…}}}

An entry is such a pair of leaves, or the name of a method. A pair must be that of a named method in all but its
backoffs. What a leaf leaves out comes from the default entry, and what that leaves out from `_BASE`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..errors import FP8ConfigError, FP8NotAvailableError, nearest
from .values import Values, check_backoff, choice, json_argument, type_name

if TYPE_CHECKING:
    from ..scales import ScaleMethod, ScaleRule

Entry = str | dict[str, dict[str, Any]]

_PARTS = ("weight", "activation")
_SECTIONS = ("nodes", "layers", "layer_types")
_BASE = {"granularity": "PTS", "scale_value_type": "MAXABS", "rounding_method": "IDENTITY", "backoff": 1.0}
_TRIPLE = ("granularity", "scale_value_type", "rounding_method")
_LEAF = {
    "granularity": choice("PTS", "PCS").check,
    "scale_value_type": choice("MAXABS", "FIXED_VALUE", "OPT", not_there=["dummy_scales"]).check,
    "rounding_method": choice("IDENTITY", "POW2", "HW_ALIGNED", "HW_ALIGNED_FIXED", "SCALE_UNIT").check,
    "backoff": check_backoff,
}
_VALUES = {"maxabs": "MAXABS", "search": "OPT", "unit": "FIXED_VALUE", "first_hardware": "FIXED_VALUE"}
_ROUNDINGS = {"identity": "IDENTITY", "pow2": "POW2", "hardware": "HW_ALIGNED"}
_FIXED_ROUNDINGS = {"unit": "SCALE_UNIT", "first_hardware": "HW_ALIGNED_FIXED"}
_LAYER_INDEX = (re.compile(r"layers\.(\d+)"), re.compile(r"layers/(\d+)"))


# --- what a config may say ----------------------------------------------------------------------------------------


def _check(where: str, value: Any) -> Entry | dict[str, Any]:
    """The name of a method; or a dict whose every entry has been found to be a method."""
    if not isinstance(value, Mapping):
        return _method_name(where, value)
    sections = ("default", *_SECTIONS)
    for section in value:
        if section not in sections:
            raise FP8ConfigError(f"unknown key {section!r} in {where}: {nearest(str(section), sections)}")
    if "default" not in value:
        raise FP8ConfigError(f"{where} has no 'default': add the entry of the modules that no other entry names")
    checked: dict[str, Any] = {"default": _entry(f"{where}['default']", value["default"])}
    for section in _SECTIONS:
        entries = value.get(section) or {}
        if not isinstance(entries, Mapping):
            raise FP8ConfigError(f"{where}[{section!r}]={entries!r} is not valid: expected a dict of entries")
        if entries:
            checked[section] = {
                _entry_key(f"{where}[{section!r}]", section, key): _entry(f"{where}[{section!r}][{key!r}]", entry)
                for key, entry in entries.items()
            }
    for place, branch in branches(checked):
        method_of(branch, f"{where}{place}")
    return checked["default"] if len(checked) == 1 and isinstance(checked["default"], str) else checked


def _method_name(where: str, value: Any) -> str:
    from ..scales import SCALE_METHODS

    if str(value).lower() not in SCALE_METHODS:
        raise FP8ConfigError(f"{where}={value!r} is unknown: {nearest(str(value), SCALE_METHODS)}")
    return str(value).lower()


def _entry_key(where: str, section: str, key: Any) -> str:
    if section == "layer_types":
        return type_name(where, key)
    if section == "layers" and not str(key).isdecimal():
        raise FP8ConfigError(f"{where} holds {key!r}: expected the number of a layer, as '3'")
    if not isinstance(key, (str, int)) or key == "":
        raise FP8ConfigError(f"{where} holds {key!r}: expected the qualified name of a module")
    return str(key)


def _entry(where: str, entry: Any) -> Entry:
    if not isinstance(entry, Mapping):
        return _method_name(where, entry)
    for part in entry:
        if part not in _PARTS:
            raise FP8ConfigError(f"unknown key {part!r} in {where}: {nearest(str(part), _PARTS)}")
    return {part: _leaf(f"{where}[{part!r}]", entry[part]) for part in _PARTS if part in entry}


def _leaf(where: str, leaf: Any) -> dict[str, Any]:
    if not isinstance(leaf, Mapping):
        raise FP8ConfigError(f"{where}={leaf!r} is not valid: expected a dict with some of {', '.join(_LEAF)}")
    leaf = dict(leaf)
    if leaf.pop("params", None):
        raise FP8NotAvailableError(f"{where}['params'] is not available in optimum_fp8 yet: remove it")
    for key in leaf:
        if key not in _LEAF:
            raise FP8ConfigError(f"unknown key {key!r} in {where}: {nearest(str(key), [*_LEAF, 'params'])}")
    return {key: check(f"{where}[{key!r}]", leaf[key]) for key, check in _LEAF.items() if key in leaf}


def _argument(text: str) -> Any:
    return json_argument(text) if text.lstrip().startswith("{") else text


SCALE_METHOD = Values(_check, "a method's name, or INC's dict", {"type": _argument, "metavar": "NAME|JSON"})


# --- what it means ------------------------------------------------------------------------------------------------


def branches(value: str | dict[str, Any]) -> Iterator[tuple[str, str | dict[str, Any]]]:
    """`scale_method` where each entry holds, behind the entry's place; the default entry is the first."""
    yield from ((place, _for_entry(value, entry)) for place, entry in _places(value))


def _places(value: str | dict[str, Any]) -> Iterator[tuple[str, Entry]]:
    """Each entry, behind its place: `['nodes']['model.layers.0.mlp.up_proj']`."""
    if isinstance(value, str):
        yield "", value
        return
    yield "['default']", value["default"]
    for section in _SECTIONS:
        yield from ((f"[{section!r}][{key!r}]", entry) for key, entry in value.get(section, {}).items())


def _for_entry(value: str | dict[str, Any], entry: Entry) -> str | dict[str, Any]:
    """`scale_method` where `entry` holds: a name, or a dict with nothing but a complete default."""
    complete = entry if isinstance(value, str) else _complete(entry, value["default"])
    return complete if isinstance(complete, str) else {"default": complete}


def for_module(value: str | dict[str, Any], names: Sequence[str], types: Sequence[str]) -> str | dict[str, Any]:
    """`scale_method` of a module: that of its own entry, else its layer's, else its type's, else the default."""
    if isinstance(value, str):
        return value
    candidates = [("nodes", list(names)), ("layers", _layer_indices(names)), ("layer_types", list(types))]
    for section, keys in candidates:
        entries = value.get(section, {})
        for key in keys:
            if key in entries:
                return _for_entry(value, entries[key])
    return _for_entry(value, value["default"])


def unused(
    value: str | dict[str, Any], modules: Iterable[tuple[Sequence[str], Sequence[str]]]
) -> list[tuple[str, str]]:
    """The (section, key) of entries that hold for none of `modules`, each given as its names and its types."""
    if isinstance(value, str):
        return []
    there: dict[str, set[str]] = {section: set() for section in _SECTIONS}
    for names, types in modules:
        there["nodes"].update(names)
        there["layers"].update(_layer_indices(names))
        there["layer_types"].update(types)
    return [(section, key) for section in _SECTIONS for key in value.get(section, {}) if key not in there[section]]


def method_of(value: str | dict[str, Any], where: str = "scale_method") -> ScaleMethod:
    """The method that a name, a complete entry, or a dict's default stands for; with the entry's own backoffs.

    Raises:
        FP8ConfigError: granularities, values and roundings that no named method has together.
    """
    from ..scales import INC_METHODS, SCALE_METHODS

    if isinstance(value, str):
        return SCALE_METHODS[value]
    if "default" in value:
        return method_of(_complete(value["default"], value["default"]), where)
    found = {part: _triple(value[part]) for part in _PARTS}
    known = {
        name: {part: _triple(_leaf_of(getattr(SCALE_METHODS[name], part))) for part in _PARTS} for name in INC_METHODS
    }
    for name, triples in known.items():
        if triples == found:
            method = SCALE_METHODS[name]
            weight, activation = (replace(getattr(method, part), backoff=value[part]["backoff"]) for part in _PARTS)
            return replace(method, weight=weight, activation=activation)
    close = max(known, key=lambda name: _likeness(known[name], found))
    raise FP8ConfigError(
        f"{where} is {_shown(found)}, which no scale method is: the nearest is {close!r}, {_shown(known[close])}"
    )


def _complete(entry: Entry, default: Entry) -> Entry:
    """`entry` with every leaf key: what it leaves out comes from the default entry, then from `_BASE`."""
    if isinstance(entry, str):
        return entry
    if isinstance(default, str):
        method = method_of(default)
        if not all(_is_incs(getattr(method, part)) for part in _PARTS):
            raise FP8ConfigError(
                f"scale_method: an entry of leaves takes what it leaves out from the default entry, and {default!r} "
                "cannot be said in leaves: give the entry a method's name, or another default"
            )
        default = {part: _leaf_of(getattr(method, part)) for part in _PARTS}
    return {part: {**_BASE, **default.get(part, {}), **entry.get(part, {})} for part in _PARTS}


def _is_incs(rule: ScaleRule) -> bool:
    """Whether INC has words for a rule: methods that others register need not be made of INC's parts."""
    from ..scales import PerChannel, PerTensor, PerToken

    granularity = isinstance(rule.granularity, (PerTensor, PerChannel, PerToken))
    return granularity and rule.value in _VALUES and rule.rounding in _ROUNDINGS


def _leaf_of(rule: ScaleRule) -> dict[str, Any]:
    """A rule of ours in INC's words."""
    from ..scales import SCALE_METHODS

    per_tensor = rule.granularity == SCALE_METHODS["maxabs_hw"].weight.granularity
    return {
        "granularity": "PTS" if per_tensor else "PCS",
        "scale_value_type": _VALUES[rule.value],
        "rounding_method": _FIXED_ROUNDINGS.get(rule.value) or _ROUNDINGS[rule.rounding],
        "backoff": rule.backoff,
    }


def _layer_indices(names: Sequence[str]) -> list[str]:
    found = (pattern.search(name) for pattern in _LAYER_INDEX for name in names)
    return [match[1] for match in found if match]


def _triple(leaf: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(leaf[key] for key in _TRIPLE)


def _likeness(triples: dict[str, tuple[str, ...]], others: dict[str, tuple[str, ...]]) -> int:
    return sum(a == b for part in _PARTS for a, b in zip(triples[part], others[part], strict=True))


def _shown(triples: dict[str, tuple[str, ...]]) -> str:
    return " with ".join(f"{part} ({', '.join(triples[part])})" for part in _PARTS)
