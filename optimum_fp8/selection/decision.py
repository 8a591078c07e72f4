"""Decision: what becomes of one module, and its scheme."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..config import FP8Config
from ..modules.handler import ModuleHandler, Reason, Why
from ..scales import Scheme

# Fields of a scheme that a module may not have as asked, and the keys that ask for them.
_KEYS = {
    "rounds_attention": "attention",
    "caches": "kv_cache",
    "dataflow": "attention_dataflow",
    "activations": "activation_scheme",
}


@dataclass(frozen=True)
class Decision:
    """What becomes of one module.

    Attributes:
        name: its qualified name.
        type: the name of its class.
        why: why it is selected, or is not.
        handler: of its kind.
        scheme: what is done to it, if it is selected.
        types: all names of its class that a configuration may use.
        names: all names of the module that a configuration may use, its qualified name first.
        limits: fields of the scheme that are not as the configuration asks, with the values they have.
    """

    name: str
    type: str
    why: Why
    handler: ModuleHandler
    scheme: Scheme
    types: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    limits: Mapping[str, Any] = field(default_factory=dict)

    @property
    def selected(self) -> bool:
        return self.why.reason is Reason.SELECTED

    @property
    def reason(self) -> str:
        """Why it is not selected (or "selected"), as the report says it."""
        return str(self.why)


def leave_out(decisions: Sequence[Decision], reasons: Mapping[str, Why]) -> list[Decision]:
    """The decisions with some modules, by name, left out after all, and why."""
    return [replace(each, why=reasons[each.name]) if each.name in reasons else each for each in decisions]


def with_limits(config: FP8Config, decisions: Sequence[Decision]) -> FP8Config:
    """The configuration with what was decided about single modules against it said as overrides, by their names."""
    said = {
        f"^{re.escape(each.name)}$": {_KEYS[name]: value for name, value in each.limits.items()}
        for each in decisions
        if each.selected and each.limits
    }
    return config.replace(overrides={**config.overrides, **said}) if said else config
