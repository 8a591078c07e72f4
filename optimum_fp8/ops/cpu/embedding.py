"""Rows of a table in FP8 on a CPU: gathered by torch as bytes, and dequantized by the native cast."""

from __future__ import annotations

import torch

from ...errors import FP8Error
from .. import reference
from ..arguments import EmbeddingCall
from .casts import Casts


class Embedding:
    """The operator `embedding` on one variant of the library."""

    def __init__(self, casts: Casts):
        self.casts = casts

    def refuses(self, call: EmbeddingCall) -> str | None:
        try:
            reference.check_embedding(call)
        except FP8Error as error:  # which the reference raises
            return str(error)
        one = call.weight_scale[:1]  # as of one row
        return self.casts.refuses_cast_from_fp8(call.weight[:1], one, call.dtype)

    def run(self, call: EmbeddingCall) -> torch.Tensor:
        codes, scale = reference.rows_of(call)
        values = self.casts.cast_from_fp8(codes, scale, call.dtype)
        return values.reshape(*call.x.shape, call.weight.shape[1])
