"""Decision: what becomes of one module, and its scheme."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from ..modules.handler import ModuleHandler, Reason, Why
from ..scales import Scheme


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
    """

    name: str
    type: str
    why: Why
    handler: ModuleHandler
    scheme: Scheme
    types: tuple[str, ...] = ()
    names: tuple[str, ...] = ()

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
