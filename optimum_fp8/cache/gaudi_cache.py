"""`KVCache` modules of model files for Gaudi in FP8: each stores keys, or values, by itself.

Their own methods do all the storing, of codes: what is written is rounded with the module's `input_scale`, and what is
handed out are codes with that same scale, for a product to take as they are.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from .. import ops
from ..formats import is_fp8
from ..modules.attention import plan_of
from ..modules.fp8_tensor import FP8Tensor
from .attach import cache_record, start_record

_ACTS_AS = "_optimum_fp8_acts_as"
_HIGH_PRECISION = "a cache in high precision was handed to update(): what is written is rounded, and stored as before"


def store_in_fp8(module: Any) -> None:
    """Look at what is written to a `KVCache` from now on; its plan says what becomes of it."""
    store_as_before(module)
    start_record(module)
    module.__dict__["allocate"] = partial(_allocate, module, module.allocate)
    module.__dict__["update"] = partial(_update, module, module.update)


def store_as_before(module: Any) -> None:
    """Let a `KVCache` store on its own again; what it holds in FP8 is dequantized."""
    for name, ours in (("allocate", _allocate), ("update", _update)):
        if getattr(module.__dict__.get(name), "func", None) is ours:
            del module.__dict__[name]
    if _holds_fp8(module):
        module.cache = ops.cast_from_fp8(module.cache, module.input_scale, module.__dict__.pop(_ACTS_AS))


def _holds_fp8(module: Any) -> bool:
    held = getattr(module, "cache", None)
    return isinstance(held, torch.Tensor) and is_fp8(held.dtype)


def _allocate(module: Any, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Allocate codes where high precision was asked for."""
    plan, given = plan_of(module), inspect.signature(original).bind(*args, **kwargs)
    in_fp8 = plan is not None and plan.recipe is not None
    if plan is not None and plan.recipe is not None:
        module.__dict__[_ACTS_AS] = given.arguments["dtype"]
        given.arguments["dtype"] = plan.recipe.fmt.dtype
    if _holds_fp8(module) is not in_fp8:
        module.cache = None  # or what is there would be taken for what is asked for
    return original(*given.args, **given.kwargs)


def _update(
    module: Any, original: Callable[..., torch.Tensor], prev: Any, cur: torch.Tensor, *args: Any, **kwargs: Any
) -> torch.Tensor:
    """Store `cur` in `prev`, and hand out what attention is to use.

    Args:
        prev: the storage: codes, what this function returned before, or in high precision.
        cur: `[batch, heads, new length, size]`.
    """
    plan = plan_of(module)
    if plan is not None and plan.observe is not None:
        plan.observe("input", cur)
    if plan is None or plan.recipe is None:
        return original(prev, cur, *args, **kwargs)
    scale, fmt, record = module.input_scale, plan.recipe.fmt, cache_record(module)
    codes = ops.cast_to_fp8(cur, scale, fmt.dtype, fmt.full_scale)
    if isinstance(prev, FP8Tensor):
        prev = prev.codes if prev.scale.data_ptr() == scale.data_ptr() else prev.dequantize()
    if isinstance(prev, torch.Tensor) and is_fp8(prev.dtype):
        record.layers = 1
        # As bytes: not every device has every operator for FP8.
        kept = original(prev.view(torch.uint8), codes.view(torch.uint8), *args, **kwargs).view(fmt.dtype)
    else:
        values = original(prev, ops.cast_from_fp8(codes, scale, cur.dtype), *args, **kwargs)
        if isinstance(prev, torch.Tensor) and values.untyped_storage().data_ptr() == prev.untyped_storage().data_ptr():
            record.refused[_HIGH_PRECISION] = record.refused.get(_HIGH_PRECISION, 0) + 1
        kept = ops.cast_to_fp8(values, scale, fmt.dtype, fmt.full_scale)
    return FP8Tensor(kept, scale, cur.dtype)
