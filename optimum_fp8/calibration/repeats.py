"""Samples that went through the model more than once: they look like more data than there are."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch


class Repeats:
    """Counts samples, and how many of them were there before.

    Attributes:
        samples: how many rows of batches were seen.
    """

    def __init__(self) -> None:
        self.samples = 0
        self._known: set[str] = set()

    def add(self, inputs: Any) -> None:
        """Note the rows of a batch; padding makes no difference.

        Args:
            inputs: what the model is given: a mapping or a tensor, with one row for each sample.
        """
        digests = _digests(inputs if isinstance(inputs, Mapping) else {"": inputs})
        self.samples += len(digests)
        self._known.update(digests)

    @property
    def repeated(self) -> int:
        """How many samples were there before."""
        return self.samples - len(self._known)


def _digests(inputs: Mapping[str, Any]) -> list[str]:
    """16 hex digits for each row of a batch."""
    tensors = {name: value for name, value in inputs.items() if isinstance(value, torch.Tensor) and value.ndim > 0}
    rows = min((len(value) for value in tensors.values()), default=0)
    mask = tensors.get("attention_mask")
    digests = [hashlib.blake2b(digest_size=8) for _ in range(rows)]
    for name in sorted(tensors):
        values = tensors[name].detach().cpu()
        for digest, row, valid in zip(digests, values, values if mask is None else mask.cpu(), strict=False):
            padded = mask is not None and mask.ndim == 2 and row.shape[:1] == valid.shape and len(values) == len(mask)
            row = row[valid.bool()] if padded else row
            digest.update(f"{name} {row.dtype} {tuple(row.shape)}\n".encode())
            if row.numel():
                digest.update(row.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return [digest.hexdigest() for digest in digests]
