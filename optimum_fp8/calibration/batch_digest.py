"""What tells calibration data from others: a digest of each batch, and their sum, in which no order shows."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch


def batch_digest(inputs: Any) -> str:
    """32 hex digits for what a model is given: names, dtypes, shapes and values of its tensors."""
    digest = hashlib.sha256()
    named = inputs if isinstance(inputs, Mapping) else {"": inputs}
    for name in sorted(named):
        value = named[name]
        if torch.is_tensor(value):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
            if value.numel():
                flat = value.detach().cpu().contiguous().reshape(-1)
                digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()[:32]


def tokens_in(inputs: Any) -> int:
    """How many tokens a batch holds, without padding; 0 for other data."""
    if not isinstance(inputs, Mapping) or not torch.is_tensor(inputs.get("input_ids")):
        return 0
    mask = inputs.get("attention_mask")
    return int(mask.sum()) if torch.is_tensor(mask) and mask.ndim == 2 else inputs["input_ids"].numel()
