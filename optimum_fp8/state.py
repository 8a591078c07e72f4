"""Where a model stands between high precision and FP8: kept on the model, so that every step knows the one before."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from .config import FP8Config
from .errors import FP8StateError
from .measure import Measurements, Observers
from .selection import Decision

_ATTRIBUTE = "_optimum_fp8_state"


@dataclass
class FP8State:
    """What has been decided about, measured on and done to a model.

    Attributes:
        config: what was asked for.
        decisions: one for every candidate module.
        phase: "measuring" or "converted".
        measurements: what calibration has seen (empty where none is needed).
        observers: the hooks at work while measuring.
        attention: one decision for every attention module; empty where attention is left alone.
        implementations: configurations of models whose attention implementation was changed, and what it was.
    """

    config: FP8Config
    decisions: list[Decision]
    phase: str
    measurements: Measurements
    observers: Observers | None = None
    attention: list[Decision] = field(default_factory=list)
    implementations: list[tuple[Any, str | None]] = field(default_factory=list)

    @property
    def selected(self) -> list[str]:
        """Names of the selected modules."""
        return [decision.name for decision in self.decisions if decision.selected]


def without(decisions: list[Decision], reasons: Mapping[str, str]) -> list[Decision]:
    """The decisions with some modules left out after all, and why."""
    return [
        Decision(decision.name, decision.type, False, reasons[decision.name]) if decision.name in reasons else decision
        for decision in decisions
    ]


def state_of(model: nn.Module) -> FP8State | None:
    """The state of `model`, None if nothing was done to it."""
    return getattr(model, _ATTRIBUTE, None)


def set_state(model: nn.Module, state: FP8State | None) -> None:
    """Remember the state on the model; None forgets it."""
    if state is None:
        model.__dict__.pop(_ATTRIBUTE, None)
    else:
        model.__dict__[_ATTRIBUTE] = state


def measuring_state(model: nn.Module, action: str) -> FP8State:
    """The state of a model that is being measured.

    Raises:
        FP8StateError: nothing is measured on this model; the message says what comes first.
    """
    state = state_of(model)
    if state is None:
        raise FP8StateError(f"{action}: this model is not being measured: call prepare(model, config) first")
    if state.phase != "measuring":
        raise FP8StateError(f"{action}: this model is already converted to FP8")
    return state
