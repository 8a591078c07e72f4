"""A fingerprint of a model's weights, so that measurements are never applied to another model unnoticed.

It hashes an evenly spaced sample of each candidate module's weight, rounded to bfloat16: cheap on any size, and the
same whether the checkpoint was loaded as bfloat16 or float32.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch

_SAMPLES = 4096


def weight_digest(weight: torch.Tensor) -> str:
    """16 hex digits for one high-precision weight of any shape (as the original module stores it)."""
    flat = weight.detach().reshape(-1)
    sample = flat[:: max(1, flat.numel() // _SAMPLES)].to(torch.bfloat16).cpu().contiguous()
    digest = hashlib.sha256(repr(tuple(weight.shape)).encode())
    digest.update(sample.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def model_fingerprint(digests: Mapping[str, str]) -> str:
    """32 hex digits for a model, from the digests of its candidate modules by name."""
    lines = "\n".join(f"{name} {digests[name]}" for name in sorted(digests))
    return hashlib.sha256(lines.encode()).hexdigest()[:32]
