"""Room for the weights that are to be loaded: FP8 modules stand in a model before its weights are read."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from torch import nn

from ..checkpoint.native import scales_in
from ..measure import Measurements
from ..modules import swap
from ..modules.handler import Reason, Target
from ..selection import Decision, names_in_checkpoint


def make_room(
    model: Any,
    decisions: Sequence[Decision],
    measured: Measurements,
    scales: dict[str, dict[str, tuple[int, ...]]] | None,
    later: Collection[str],
) -> None:
    """Put FP8 modules in the place of those that have been decided on.

    Args:
        model: whose weights are not loaded yet.
        decisions: about its modules.
        measured: the ranges that are known.
        scales: of the checkpoint, by module, where it is an FP8 one; else None.
        later: the names of modules that get their weights after loading, because they are tied or folded.
    """
    replacements: dict[nn.Module, nn.Module] = {}
    for decision in decisions:
        # What another implementation computes has scales in a checkpoint, too.
        expected = decision.selected or decision.why.reason is Reason.IMPLEMENTATION_CHOSEN
        if not expected or decision.name in later:
            continue
        module, ranges = model.get_submodule(decision.name), measured.at(decision.name)
        target = Target(decision.name, module, decision.handler, decision.scheme, ranges, model)
        names = names_in_checkpoint(decision.name, f"{model.base_model_prefix}.")
        made = decision.handler.expect(target, None if scales is None else scales_in(names, scales))
        if made is not None:
            replacements[module] = made
    swap(model, replacements)
