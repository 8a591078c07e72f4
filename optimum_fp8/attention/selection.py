"""Attention to chosen keys: models that hand over which keys each query attends to, as top-k indices or as blocks.

Choosing is the model's, in high precision. For "eager" and "sdpa" such a model turns the choice into a mask itself; for
any other attention function it hands the choice over. Ours makes the mask that the model would have made, so that the
probabilities of all other keys are 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..errors import FP8NotAvailableError

INDICES, BLOCKS = "indices", "block_indices"
SELECTING = (INDICES, BLOCKS)


def is_known(cls: type) -> bool:
    """Whether what a class hands over under these names means what `with_selection` takes it for."""
    return cls.__module__.startswith("transformers.models.")


def with_selection(
    module: nn.Module, mask: torch.Tensor | None, query: torch.Tensor, positions: int, options: Mapping[str, Any]
) -> torch.Tensor | None:
    """`mask` without the keys that `options` do not select.

    Args:
        module: the attention module.
        mask: additive or boolean, broadcastable to `[B, H, S, T]`, or None.
        query: `[B, H, S, D]`.
        positions: T, how many keys there are.
        options: what the module hands over besides: "indices", int `[B, S, top-k]`, positions of keys, or
            "block_indices", int `[B, groups, S, top-k]`, of blocks that the module's indexer knows.

    Raises:
        FP8NotAvailableError: indices of another shape, or blocks and no indexer that makes a mask of them.
    """
    indices, blocks = (options.get(name) for name in SELECTING)
    if blocks is not None:
        make_mask = getattr(getattr(module, "indexer", None), "build_block_mask", None)
        if make_mask is None:
            raise _unknown(module, f"{BLOCKS!r}", "an indexer with build_block_mask() that says which")
        return make_mask(blocks, mask, positions, query.dtype, query.device, options.get("position_ids"))
    if indices is None:
        return mask
    if indices.shape[:-1] != (query.shape[0], query.shape[2]) or indices.is_floating_point():
        found = f"{INDICES!r} of {tuple(indices.shape)} and {indices.dtype}"
        raise _unknown(module, found, f"integers ({query.shape[0]}, {query.shape[2]}, top-k)")
    selected = indices.new_zeros((*indices.shape[:2], positions), dtype=torch.bool).scatter(-1, indices.long(), True)
    selected = selected.unsqueeze(1)
    if mask is None or mask.dtype == torch.bool:
        return selected if mask is None else mask & selected
    return mask.masked_fill(~selected, torch.finfo(query.dtype).min)


def _unknown(module: nn.Module, found: str, expected: str) -> FP8NotAvailableError:
    return FP8NotAvailableError(
        f"{type(module).__name__} passes {found}, which select the keys to attend to; expected {expected}: put the "
        "module on the blocklist and choose attn_implementation='eager'"
    )
