"""Products of codes on Gaudi: `fp8_gemm_v2`, whose arguments `A_scale_inv` and `B_scale_inv` are s, not 1/s.

Never with a bias: the graph compiler could not put the cast that follows into the product.
"""

from __future__ import annotations

import torch

from ..constants import constant_of
from .bridge import offers, operator


def gemm(
    a: torch.Tensor, b: torch.Tensor, a_scale: torch.Tensor, b_scale: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """(a @ b) · a_scale · b_scale, accumulated and scaled in float32.

    Args:
        a: codes `[…, M, K]` or `[K]`.
        b: codes `[…, K, N]`, which may be a transposed view.
        a_scale: float32 `(1,)` or `[…, M, 1]`; or by blocks, see `takes_blocks`.
        b_scale: float32 `(1,)` or `[…, 1, N]`, `(N,)`; or by blocks.
        dtype: bfloat16 or float32.
    """
    b, transposed = _stored(b)
    left, right = constant_of(a_scale), constant_of(b_scale)
    if left is not None and right is not None:  # numbers both, or tensors both
        return operator("fp8_gemm_v2", "scalar")(a, False, b, transposed, None, dtype, left, right)
    return operator("fp8_gemm_v2")(a, False, b, transposed, None, dtype, a_scale, b_scale)


def takes_blocks() -> bool:
    """Whether scales may change along what is summed over: in blocks of 1 × g for `a`, with g × g for `b`."""
    return offers("cast_to_fp8_just_in_time")  # the operator that makes such scales came with it


def _stored(b: torch.Tensor) -> tuple[torch.Tensor, bool]:
    """A right operand as it lies in memory, and whether that is transposed."""
    return (b.mT, True) if not b.is_contiguous() and b.mT.is_contiguous() else (b, False)
