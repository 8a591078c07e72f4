"""Ties between weights: a module in FP8 has a weight of its own, and transformers must not tie it to another again.

What models tie stands in `_tied_weights_keys` of their classes. Instances are given what is left of it. The flag
`config.tie_word_embeddings` stays as it is, because models scale their logits or embeddings by it.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import nn

from ..modules.fused_layout import layout_of
from ..modules.handler import Change

_KEYS, _EXPANDED = "_tied_weights_keys", "all_tied_weights_keys"


class Untied(Change):
    """Ties that were taken from a model; undone, they hold again."""

    def undo(self) -> None:
        super().undo()
        self.owner.tie_weights(recompute_mapping=False)


def tied_modules(model: Any) -> set[str]:
    """Names of the modules whose weight, or stacks of weights, is tied to another one's, or another one's to theirs."""
    ties: dict[str, str] = getattr(model, _EXPANDED, None) or {}
    keys, experts = {*ties, *ties.values()}, _experts_of_stacks(model) if ties else {}
    layers = {key.removesuffix(".weight") for key in keys if key.endswith(".weight")}
    return layers | {experts[key] for key in keys if key in experts}


def untie(model: Any, names: Collection[str]) -> list[Change]:
    """Take the modules called `names` out of all ties of `model` and of the models in it.

    Returns:
        what was changed.
    """
    chosen = set(names)
    keys = {f"{name}.weight" for name in chosen}
    keys |= {key for key, name in _experts_of_stacks(model).items() if name in chosen}
    changes: list[Change] = []
    for prefix, part in model.named_modules():
        if _EXPANDED not in part.__dict__:  # no model of transformers, but perhaps one that passes on what is in it
            continue
        dot = f"{prefix}." if prefix else ""
        ties = part.all_tied_weights_keys
        left = _without(ties, {key.removeprefix(dot) for key in keys if key.startswith(dot)})
        if left != ties:
            changes += [Change(part, _KEYS, getattr(part, _KEYS)), Untied(part, _EXPANDED, ties)]
            part._tied_weights_keys, part.all_tied_weights_keys = left, left.copy()
    return changes


def _experts_of_stacks(model: nn.Module) -> dict[str, str]:
    """The names of experts, in FP8 or not, by those of the stacks that hold their weights: `layers.0.experts.w1`."""
    return {
        f"{name}.{stack}": name
        for name, module in model.named_modules()
        if (layout := layout_of(module)) is not None
        for stack in layout.stacks
    }


def _without(ties: dict[str, str], keys: set[str]) -> dict[str, str]:
    """Ties, target to source, less those of `keys`; of targets that lose their source, the first takes its place."""
    heirs: dict[str, str] = {}
    left: dict[str, str] = {}
    for target, source in ties.items():
        if target in keys:
            continue
        if source in keys:
            source = heirs.setdefault(source, target)
        if source != target:
            left[target] = source
    return left
