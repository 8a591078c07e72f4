"""What transformers needs in order to save a converted model soundly."""

from __future__ import annotations

from typing import Any

import torch
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import PrefixChange

from ..checkpoint import Native, checkpoint_of
from ..checkpoint.native import carried_config
from ..config import FP8Config
from ..lifecycle import FP8State
from ..modules import fp8_modules
from ..selection import with_limits
from .conversions import without_fp8
from .resizing import guard_resizing
from .ties import untie

_COMPILED = "_orig_mod."  # between the names of a compiled module and of what is in it


def config_to_save(model: Any, state: FP8State) -> FP8Config:
    """The configuration that the checkpoint of a model in this state carries."""
    selected = [(each.names, each.types) for each in state.decisions if each.selected]
    left_out = [each.name for each in state.decisions if not each.selected]
    return carried_config(with_limits(state.config, state.decisions), selected, left_out, type(model).__name__)


def mark_as_quantized(model: Any, config: FP8Config, state: FP8State) -> None:
    """Give a converted model its config, no stale weight conversions, and no broken ties."""
    model.config.quantization_config = config
    names = list(fp8_modules(model))
    conversions: Any = getattr(model, "_weight_conversions", None)
    if conversions is None:  # made from a config: what transformers would look up when saving
        conversions = get_model_conversion_mapping(model, add_legacy=False)
        conversions = [conversion for conversion in conversions if not isinstance(conversion, PrefixChange)]
    model._weight_conversions = without_fp8(conversions, names)
    state.changes += [*untie(model, names), *guard_resizing(model)]


def tensors_to_save(model: Any) -> dict[str, torch.Tensor]:
    """The state dict as it goes to disk.

    Raises:
        FP8StateError: the model is still being measured.
        FP8NotAvailableError: weights are offloaded.
        FP8CheckpointError: a scale that is not set, zero, NaN or infinite.
    """
    checkpoint, native = checkpoint_of(model), Native()
    native.refuse(checkpoint)
    tensors, written = model.state_dict(), set()
    for name, tensor in native.tensors(checkpoint).items():
        if name in tensors:  # untied, each has its own: transformers saves what is shared only where it is tied
            tensors[name] = tensor.detach().clone() if tensor.data_ptr() in written else tensor.detach()
            written.add(tensor.data_ptr())
    return {name.replace(_COMPILED, ""): tensor for name, tensor in tensors.items()}
