"""What transformers needs in order to save a converted model soundly."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import PrefixChange

from ..checkpoint import Native, checkpoint_of
from ..checkpoint.names import COMPILED
from ..checkpoint.native import carried_config, refuse_unsound
from ..config import FP8Config
from ..errors import FP8CheckpointError
from ..formats import is_fp8, not_finite
from ..lifecycle import FP8State, refuse_spread
from ..modules.handler import Change, converted_modules
from ..selection import with_limits
from .conversions import keys_of_codes, without_fp8
from .resizing import guard_resizing
from .staged_saving import guard_saving
from .ties import untie
from .training import guard_training


def config_to_save(model: Any, state: FP8State) -> FP8Config:
    """The configuration that the checkpoint of a model in this state carries."""
    selected = [(each.names, each.types) for each in state.decisions if each.selected]
    left_out = [each.name for each in state.decisions if not each.selected]
    return carried_config(with_limits(state.config, state.decisions), selected, left_out, type(model).__name__)


def mark_as_quantized(model: Any, config: FP8Config, state: FP8State) -> None:
    """Give a converted model its config, no stale weight conversions, and no broken ties."""
    model.config.quantization_config = config
    names = [name for name, (_, handler) in converted_modules(model).items() if handler.family.replaced]
    conversions: Any = getattr(model, "_weight_conversions", None)
    if conversions is None:  # made from a config: what transformers would look up when saving
        conversions = get_model_conversion_mapping(model, add_legacy=False)
        conversions = [conversion for conversion in conversions if not isinstance(conversion, PrefixChange)]
    before, kept = getattr(model, "_weight_conversions", None), without_fp8(conversions, keys_of_codes(model))
    if kept != before:
        model._weight_conversions = kept
        state.changes.append(Change(model, "_weight_conversions", before))
    state.changes += [*untie(model, names), *guard_resizing(model), *guard_saving(model), *guard_training(model)]


def tensors_to_save(model: Any, given: Mapping[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
    """The state dict as it goes to disk: the model's, or the one `given` in its place.

    Raises:
        FP8StateError: the model is still being measured.
        FP8NotAvailableError: weights are offloaded, or each process has its part of them.
        FP8CheckpointError: a scale that is not set, zero, NaN or infinite; a given state dict that is no FP8 one.
    """
    refuse_spread(model, "save_pretrained")
    checkpoint, native = checkpoint_of(model), Native()
    native.refuse(checkpoint)
    tensors, ours = _plain_names(model.state_dict() if given is None else given), native.tensors(checkpoint)
    ours = _plain_names(ours)
    if given is not None:
        ours = _taken_from(tensors, ours)
    written: set[int] = set()
    for name, tensor in ours.items():
        if name in tensors:  # untied, each has its own: transformers saves what is shared only where it is tied
            tensors[name] = tensor.detach().clone() if tensor.data_ptr() in written else tensor.detach()
            written.add(tensor.data_ptr())
    return tensors


def _plain_names(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.replace(COMPILED, ""): tensor for name, tensor in tensors.items()}


def _taken_from(given: Mapping[str, torch.Tensor], ours: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of the modules in FP8 out of a state dict that a caller gave, in the form in which they are stored.

    Raises:
        FP8CheckpointError: names the first that is missing, or of another dtype or shape, or not sound.
    """
    taken: dict[str, torch.Tensor] = {}
    for name, own in ours.items():
        tensor = given.get(name)
        found = None if tensor is None else (tensor.dtype, tuple(tensor.shape))
        expected = (own.dtype, tuple(own.shape))
        if tensor is None or found != expected or (is_fp8(tensor.dtype) and not_finite(tensor)):
            wrong = "codes that are NaN or Inf" if found == expected else found or "nothing"
            raise FP8CheckpointError(
                f"state_dict: found {wrong} for {name} of a model in FP8, expected {expected}: pass what "
                "model.state_dict() of the converted model holds, or leave state_dict out"
            )
        taken[name] = tensor
    refuse_unsound(((*name.rpartition(".")[::2], tensor) for name, tensor in taken.items()), "saved")
    return taken
