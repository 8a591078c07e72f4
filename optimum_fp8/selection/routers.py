"""Layers that choose the experts of each token, or weigh the shared ones: a wrong choice costs more than FP8 saves."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from ..measure.experts import number_of_experts
from ..modules.expert_layouts import layout_of
from ..modules.fused_experts import FP8FusedExperts, is_fused


def routers(model: nn.Module) -> set[nn.Module]:
    """The linear layers beside experts that have one output for each of these, or one at all.

    Models written for Gaudi are left out: theirs are layers, as INC has them.
    """
    found: set[nn.Module] = set()
    for block in model.modules():
        counts = dict(_experts_in(block))
        if not counts or any(layout_of(module) is not None for module in block.modules()):
            continue
        for child in block.children():
            layers = [] if child in counts else [each for each in child.modules() if isinstance(each, nn.Linear)]
            outputs = {*counts.values(), *([1] if child in layers else [])}
            found.update(layer for layer in layers if layer.out_features in outputs)
    return found


def _experts_in(block: nn.Module) -> Iterator[tuple[nn.Module, int]]:
    """The experts that stand in a module itself, and how many they are."""
    for name, child in block.named_children():
        declared = isinstance(child, FP8FusedExperts) or is_fused(child) or hasattr(child, "num_experts")
        count = number_of_experts(child) if declared else None
        if count is None and "expert" in name:
            parts = list(child.children())
            alike = len({type(part) for part in parts}) == 1 and not isinstance(parts[0], nn.Linear)
            count = len(parts) if alike else None
        if count is not None:
            yield child, count
