"""Searches for the weight scale with the least squared error (INC's "OPT" methods).

Ties decide often, because FP8's error is nearly scale-free, so their order is part of the definition: over the
hardware list (descending) and over 2^-10 … 2^9 (ascending) the last of the equals wins, per channel the smallest.
"""

from __future__ import annotations

import torch

from .. import ops
from ..formats import NumberFormat

_POW2_CANDIDATES = [2.0**e for e in range(-10, 10)]
_CHANNEL_MULTIPLIERS = [2.0**e for e in range(-3, 5)]


def search_tensor_scale(weight: torch.Tensor, rounding: str, fmt: NumberFormat, hp_dtype: torch.dtype) -> torch.Tensor:
    """One scale for the whole tensor, `(1,)` float32: the candidate with the least ‖W − Ŵ‖₂, kept in `hp_dtype`."""
    candidates = fmt.search_scales if rounding == "hardware" else _POW2_CANDIDATES
    best, best_error = candidates[0], None
    for candidate in candidates:
        scale = torch.tensor([candidate], dtype=torch.float32, device=weight.device)
        error = torch.linalg.vector_norm(weight - _round_trip(weight, scale, fmt, hp_dtype)).to(hp_dtype)
        if best_error is None or bool(error <= best_error):
            best, best_error = candidate, error
    return torch.tensor([best], dtype=torch.float32, device=weight.device)


def search_channel_scales(weight: torch.Tensor, reference: torch.Tensor, fmt: NumberFormat) -> torch.Tensor:
    """One scale an output channel: `reference` times the 2^k (k = -3 … 4) with the least squared error."""
    best, best_error = reference.clone(), torch.full_like(reference, torch.inf)
    for multiplier in _CHANNEL_MULTIPLIERS:
        scale = reference * multiplier
        error = weight - _round_trip(weight, scale, fmt, weight.dtype)
        error = error.square().flatten(1).sum(1).float().reshape(reference.shape)
        better = error < best_error
        best, best_error = torch.where(better, scale, best), torch.where(better, error, best_error)
    return best


def _round_trip(weight: torch.Tensor, scale: torch.Tensor, fmt: NumberFormat, dtype: torch.dtype) -> torch.Tensor:
    return ops.cast_from_fp8(ops.cast_to_fp8(weight, scale, fmt.dtype, fmt.full_scale), scale, dtype)
