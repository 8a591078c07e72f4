"""Layers that choose the experts of each token, or weigh the shared ones: a wrong choice costs more than FP8 saves."""

from __future__ import annotations

import logging
from collections.abc import Iterator

from torch import nn

from ..measure.experts import number_of_experts
from ..modules.expert_layouts import layout_of
from ..modules.fused_experts import FP8FusedExperts
from ..modules.fused_layout import is_fused

logger = logging.getLogger(__name__)


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


def warn_of_bare_routers(model: nn.Module) -> None:
    """Say which modules beside experts hold the router's weight as a bare parameter, and so are no layers."""
    names = []
    for name, block in model.named_modules():
        counts = dict(_experts_in(block))
        for own, child in block.named_children() if counts else ():
            weight = None if isinstance(child, nn.Linear) else child._parameters.get("weight")
            if weight is not None and weight.ndim == 2 and weight.shape[0] in counts.values():
                names.append(f"{name}.{own}" if name else own)
    if names:
        logger.warning(
            "quantize_routers=True does nothing for %d routers that hold a bare parameter instead of a Linear: they "
            "stay in high precision (%s%s)",
            *(len(names), ", ".join(names[:4]), ", …" if len(names) > 4 else ""),
        )


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
