"""From FP8 modules back to a model in high precision."""

from __future__ import annotations

import torch
from torch import nn

from ..errors import FP8NotAvailableError
from ..modules import swap
from ..modules.folded_batch_norm import unfold
from ..modules.handler import converted_modules
from .sharded import refuse_spread
from .state import set_state, state_of, unwrapped


def dequantize(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Put modules of the original classes, with dequantized weights, in place of the FP8 modules of `model`.

    Args:
        model: a converted model (transformers models have this as `model.dequantize()`).
        dtype: of the weights; by default the one they had.

    Returns:
        `model` itself.

    Raises:
        FP8NotAvailableError: some weights are offloaded, or each process has its part of them.
    """
    given, model = model, unwrapped(model)
    refuse_spread(model, "dequantize")
    found = converted_modules(model).values()
    if any(tensor.is_meta for module, handler in found for tensor in handler.state(module).values()):
        raise FP8NotAvailableError("dequantize: some weights are offloaded: load the model without offloading")
    states = {part: state for part in model.modules() if (state := state_of(part)) is not None}
    for state in states.values():
        if state.observers is not None:
            state.observers.remove()
    restored = {module: handler.restore(module, dtype) for module, handler in found}
    swap(model, {module: new for module, new in restored.items() if new is not None})
    for part, state in states.items():
        for change in reversed(state.changes):
            change.undo()
        set_state(part, None)
    unfold(model)
    return given
