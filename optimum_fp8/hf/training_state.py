"""What quantization-aware training remembers, in the files of a model that was saved in it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from safetensors import safe_open

from ..errors import FP8CheckpointError
from ..modules.fake_quantized import CHILD

_PART = f".{CHILD}."


def training_state(model: Any, files: Sequence[str] | None) -> dict[str, torch.Tensor]:
    """The tensors by name, and a model whose loading does not take them for foreign ones."""
    found: dict[str, torch.Tensor] = {}
    for path in files or ():
        if str(path).endswith(".safetensors"):
            with safe_open(path, framework="pt") as file:
                found |= {key: file.get_tensor(key) for key in file.keys() if _PART in key}  # noqa: SIM118
    if found:
        known = model._keys_to_ignore_on_load_unexpected or ()
        model._keys_to_ignore_on_load_unexpected = {*known, rf"\.{CHILD}\."}
    return found


def restore_training_state(model: Any, tensors: dict[str, torch.Tensor]) -> None:
    """Have a model in training go on from there.

    Raises:
        FP8CheckpointError: it is trained otherwise than it was.
    """
    own = {name: tensor for name, tensor in model.state_dict().items() if _PART in name}
    if tensors and {name: x.shape for name, x in own.items()} != {name: x.shape for name, x in tensors.items()}:
        raise FP8CheckpointError(
            "this model was saved in quantization-aware training with other modules, amax_history_len or "
            "freeze_scales_at: give the config that it was trained with, or start from a model that was saved after "
            "dequantize(model), which ends training"
        )
    model.load_state_dict(tensors, strict=False)
