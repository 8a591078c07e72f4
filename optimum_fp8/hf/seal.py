"""What the record of a model that is being saved says of its tensors, by the names that transformers gives them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers.core_model_loading import revert_weight_conversion

from ..checkpoint.digests import RECORD, sealed
from ..checkpoint.intact import record
from ..config import FP8Config
from .loading_call import saving_arguments


def sealed_metadata(
    model: Any, config: FP8Config, told: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]
) -> dict[str, str]:
    """The metadata of the files that `save_pretrained` writes: the record, with a digest of each tensor.

    Args:
        model: that is being saved.
        config: as it is saved.
        told: what else the record says.
        tensors: its state, as it is handed to transformers.
    """
    return {RECORD: record(model, config, **told, **_sealed(model, config, tensors))}


def _sealed(model: Any, config: FP8Config, tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """The digests and the id of the save.

    transformers leaves out, renames and splits tensors after it has asked for the metadata of all files: the same is
    done here beforehand, with views of them. A process that writes nothing, or adapters alone, has nothing to say.
    """
    from transformers.modeling_utils import remove_tied_weights_from_state_dict  # which waits for our quantizer

    asked = saving_arguments(model)
    if not asked.get("is_main_process", True) or getattr(model, "_hf_peft_config_loaded", False):
        return {}
    written = {name: each for name, each in tensors.items() if name not in (model._keys_to_ignore_on_save or ())}
    written = remove_tied_weights_from_state_dict(written, model)
    if asked.get("save_original_format", True):
        written = revert_weight_conversion(model, written)
    return sealed(written, config.to_dict())
