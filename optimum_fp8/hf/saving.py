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
from .conversions import without_fp8


def config_to_save(state: FP8State) -> FP8Config:
    """The configuration that the checkpoint of a model in this state carries."""
    selected = [(each.names, each.types) for each in state.decisions if each.selected]
    return carried_config(state.config, selected, [each.name for each in state.decisions if not each.selected])


def mark_as_quantized(model: Any, config: FP8Config) -> None:
    """Give a converted model its config, no stale weight conversions, and no broken ties."""
    model.config.quantization_config = config
    modules = fp8_modules(model)
    names = list(modules)
    for module in modules.values():
        module.managed = True
    conversions: Any = getattr(model, "_weight_conversions", None)
    if conversions is None:  # made from a config: what transformers would look up when saving
        conversions = get_model_conversion_mapping(model, add_legacy=False)
        conversions = [conversion for conversion in conversions if not isinstance(conversion, PrefixChange)]
    model._weight_conversions = without_fp8(conversions, names)
    _untie(model, names)


def tensors_to_save(model: Any) -> dict[str, torch.Tensor]:
    """The state dict as it goes to disk.

    Raises:
        FP8StateError: the model is still being measured.
        FP8NotAvailableError: weights are offloaded.
        FP8CheckpointError: a scale that is not set, zero, NaN or infinite.
    """
    checkpoint, native = checkpoint_of(model), Native()
    native.refuse(checkpoint)
    tensors = model.state_dict()
    return tensors | {name: tensor.detach() for name, tensor in native.tensors(checkpoint).items() if name in tensors}


def _untie(model: Any, names: list[str]) -> None:
    """An output head in FP8 has a weight of its own: it is no longer tied to the embedding."""
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    broken = [key for key in tied if key.removesuffix(".weight") in names]
    if broken:
        model.all_tied_weights_keys = {key: source for key, source in tied.items() if key not in broken}
        for config in {id(c): c for c in (model.config, model.config.get_text_config(decoder=True))}.values():
            config.tie_word_embeddings = False
