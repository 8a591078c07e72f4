"""Intel Gaudi's kernels: the operators through `torch.ops.hpu`, as Gaudi's PyTorch bridge declares them.

They serve tensors on the device "hpu", and any tensors where `ops.backend("hpu")` forces them, over an emulated bridge
for example. Which operators there are is asked at each call: a bridge may be loaded after this package.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .. import reference
from ..dispatch import Kernel, note_missing, register_kernel
from ..packing import Packing, register_packing
from . import attention, attention_steps, casts, conv, experts, linear, matmul, ranges, startup
from .bridge import why_missing

BACKEND, DEVICES = "hpu", ("hpu",)


def takes_all(call: Any) -> None:
    """What refuses no call, and is slow for none."""


_SLOWER: dict[str, Callable[[Any], str | None]] = {"attention": attention.slower}
_KERNELS: dict[str, tuple[Callable[[Any], Any], Callable[[Any], str | None]]] = {
    "cast_to_fp8": (casts.cast_to, casts.refuses_cast_to),
    "cast_from_fp8": (casts.cast_from, casts.refuses_cast_from),
    "cast_to_fp8_by_range": (ranges.cast_by_range, ranges.refuses_cast_by_range),
    "maxabs": (lambda call: reference.maxabs(*call), takes_all),
    "histogram": (lambda call: reference.histogram(*call), takes_all),
    "dynamic_scale": (ranges.dynamic_scale, takes_all),
    "linear": (linear.run, linear.refuses),
    "matmul": (matmul.run, matmul.refuses),
    "conv": (conv.run, conv.refuses),
    "attention": (attention.run, attention.refuses),
    "attention_weights": (attention_steps.attention_weights, attention_steps.refuses),
    "softmax": (attention_steps.softmax, attention_steps.refuses_softmax),
    "experts": (experts.experts, experts.refuses),
}


def register() -> None:
    """Register Gaudi's kernels, and note that they cannot run while no bridge is loaded."""
    note_missing(BACKEND, why_missing)
    packing = Packing(DEVICES, _transposed, constants=True, set_up=startup.set_up, initialize=startup.initialize)
    register_packing(BACKEND, packing)
    for operator, (run, refuses) in _KERNELS.items():
        slower = _SLOWER.get(operator, takes_all)
        register_kernel(operator, Kernel(BACKEND, DEVICES, run, refuses, traced=True, slower=slower))


def _transposed(matrix: torch.Tensor) -> torch.Tensor:
    """`[out, in]` whose transpose is contiguous: what a GEMM that transposes nothing reads."""
    return matrix.t().contiguous().t()
