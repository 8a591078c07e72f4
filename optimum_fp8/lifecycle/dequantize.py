"""From FP8 modules back to a model in high precision."""

from __future__ import annotations

import torch
from torch import nn

from ..errors import FP8NotAvailableError
from ..modules import swap
from ..modules.handler import converted_modules
from .state import set_state, state_of


def dequantize(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Put modules of the original classes, with dequantized weights, in place of the FP8 modules of `model`.

    Args:
        model: a converted model (transformers models have this as `model.dequantize()`).
        dtype: of the weights; by default the one they had.

    Returns:
        `model` itself.

    Raises:
        FP8NotAvailableError: some weights are offloaded.
    """
    found, state = converted_modules(model).values(), state_of(model)
    if any(tensor.is_meta for module, handler in found for tensor in handler.state(module).values()):
        raise FP8NotAvailableError("dequantize: some weights are offloaded: load the model without offloading")
    if state is not None and state.observers is not None:
        state.observers.remove()
    restored = {module: handler.restore(module, dtype) for module, handler in found}
    swap(model, {module: new for module, new in restored.items() if new is not None})
    for change in reversed(state.changes if state is not None else []):
        change.undo()
    set_state(model, None)
    return model
