"""`generate_batch` (continuous batching) takes transformers' own attention functions only, and a cache of its own.

A model that looks up ours falls back to what it ran before, from when the manager is made to when it stops; a warning
says so, and the report counts it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import nn

from .. import ops
from ..modules.handler import Change
from .function import NAME
from .plan import plan_of

logger = logging.getLogger(__name__)

_STARTS = "init_continuous_batching"
_FALLBACK = "generate_batch takes transformers' own attention and cache only"


class _OwnStart(Change):
    """A method set on a model itself, in front of its class's."""

    def undo(self) -> None:
        self.owner.__dict__.pop(self.attribute, None)


def fall_back_in_batches(model: nn.Module, implementations: Sequence[Change]) -> list[Change]:
    """Have continuous batching run what `implementations` changed, as it was before; nothing where there is none."""
    if not implementations or not hasattr(type(model), _STARTS) or _STARTS in model.__dict__:
        return []
    model.__dict__[_STARTS] = partial(_start, model, list(implementations))
    return [_OwnStart(model, _STARTS, None)]


def _start(model: Any, implementations: list[Change], *args: Any, **kwargs: Any) -> Any:
    """Make the manager of continuous batching, with the model's own attention until it stops."""
    running = [change for change in implementations if getattr(change.owner, change.attribute) == NAME]
    for change in running:
        change.undo()
    try:
        manager = getattr(type(model), _STARTS)(model, *args, **kwargs)
    except BaseException:
        _set_ours(running)
        raise
    if running:
        _tell(model)
        if getattr(manager.stop, "func", None) is not _stop:  # one that is kept for further batches
            manager.stop = partial(_stop, manager.stop, running)
    return manager


def _stop(original: Callable[..., Any], running: list[Change], *args: Any, **kwargs: Any) -> Any:
    stopped = original(*args, **kwargs)
    _set_ours(running)
    return stopped


def _set_ours(running: list[Change]) -> None:
    for change in running:
        if getattr(change.owner, change.attribute) == change.before:
            setattr(change.owner, change.attribute, NAME)


def _tell(model: nn.Module) -> None:
    """Count a batch that attention was not in FP8 for, and warn of the first."""
    plans = [plan for module in model.modules() if (plan := plan_of(module)) is not None]
    if not any(_FALLBACK in reason for plan in plans for *_, reason in plan.record.fallbacks):
        logger.warning("%s: attention and its cache are in high precision there, layers in FP8", _FALLBACK)
    for plan in plans:
        ops.note_fallback(plan.record, "attention", _FALLBACK)
