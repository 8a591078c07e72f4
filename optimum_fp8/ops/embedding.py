"""Rows of a table in FP8: schema, fake kernel and the function to call."""

from __future__ import annotations

import torch

from . import reference
from .arguments import EmbeddingCall
from .declare import call, declare
from .records import CallRecord


def embedding(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    dtype: torch.dtype,
    *,
    record: CallRecord | None = None,
) -> torch.Tensor:
    """The rows of a table that `x` names, dequantized: codes · scale in float32, rounded once to `dtype`.

    Args:
        x: indices, int64 or int32, any shape.
        weight: the table `[rows, size]`, FP8; nothing of it is dequantized but the rows that are asked for.
        weight_scale: float32, `(1,)`, or `(rows, 1)`, one for each row.
        dtype: of the result.
        record: counts the call for the module that makes it.

    Returns:
        `[*x.shape, size]` in `dtype`.

    Raises:
        FP8OperandError: `x` holds no indices, or the table is no matrix in FP8.
        FP8ScaleError: the scale does not fit the table.
        IndexError: an index of no row.
    """
    return call("embedding", EmbeddingCall(x, weight, weight_scale, dtype), record)


def _fake(call: EmbeddingCall) -> torch.Tensor:
    return call.weight.new_empty((*call.x.shape, call.weight.shape[1]), dtype=call.dtype)


declare(
    "embedding",
    "(Tensor x, Tensor weight, Tensor weight_scale, ScalarType dtype) -> Tensor",
    EmbeddingCall,
    _fake,
    reference.embedding,
    attributed_by=("weight",),
)
