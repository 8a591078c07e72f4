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
from ..cache import FP8Tensor, as_stored, cache_record, start_record
from ..formats import is_fp8
from ..modules.handler import Reason, Surroundings, Target, Why, register_handler
from ..scales import Scheme
from .detect import Kind
from .handler import AttentionHandler
from .plan import plan_of
from .scale_module import scale_of

_ACTS_AS = "_optimum_fp8_acts_as"
HIGH_PRECISION = "a cache in high precision was handed to update(): what is written is rounded, and stored as before"


def store_in_fp8(module: Any) -> None:
    """Have a `KVCache` store codes, or have what is written observed, as its plan says."""
    store_as_before(module)
    start_record(module)
    module.__dict__["allocate"] = partial(_allocate, module, module.allocate)
    module.__dict__["update"] = partial(_update, module, module.update)


def store_as_before(module: Any) -> None:
    """Have a `KVCache` store in high precision again; what it holds in FP8 is dequantized."""
    for name, ours in (("allocate", _allocate), ("update", _update)):
        if getattr(module.__dict__.get(name), "func", None) is ours:
            del module.__dict__[name]
    if _holds_fp8(module):
        module.cache = ops.cast_from_fp8(module.cache, _scale(module), module.__dict__.pop(_ACTS_AS))


def _holds_fp8(module: Any) -> bool:
    held = getattr(module, "cache", None)
    return isinstance(held, torch.Tensor) and is_fp8(held.dtype)


def _scale(module: Any) -> torch.Tensor:
    scale = scale_of(module, "input_scale")
    assert scale is not None  # a KVCache is converted with a static scale only
    return scale


def _allocate(module: Any, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Allocate codes where high precision was asked for."""
    plan, given = plan_of(module), inspect.signature(original).bind(*args, **kwargs)
    in_fp8 = plan is not None and plan.scheme is not None
    if plan is not None and plan.scheme is not None:
        module.__dict__[_ACTS_AS] = given.arguments["dtype"]
        given.arguments["dtype"] = plan.scheme.fmt.dtype
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
    if plan is None or plan.scheme is None:
        return original(prev, cur, *args, **kwargs)
    scale, fmt, record = _scale(module), plan.scheme.fmt, cache_record(module)
    codes = ops.cast_to_fp8(cur, scale, fmt.dtype, fmt.full_scale)
    if isinstance(prev, FP8Tensor):
        prev = prev.codes if prev.scale.data_ptr() == scale.data_ptr() else prev.dequantize()
    if isinstance(prev, torch.Tensor) and is_fp8(prev.dtype):
        record.layers = 1
        kept = original(as_stored(prev), as_stored(codes), *args, **kwargs).view(fmt.dtype)
    else:
        values = original(prev, ops.cast_from_fp8(codes, scale, cur.dtype), *args, **kwargs)
        if isinstance(prev, torch.Tensor) and values.untyped_storage().data_ptr() == prev.untyped_storage().data_ptr():
            record.refused[HIGH_PRECISION] = record.refused.get(HIGH_PRECISION, 0) + 1
        kept = ops.cast_to_fp8(values, scale, fmt.dtype, fmt.full_scale)
    return FP8Tensor(kept, scale, cur.dtype)


class StorageHandler(AttentionHandler):
    """`KVCache` modules: they store keys, or values."""

    kind, way, types = "attention storage", Kind.STORAGE, ("KVCache",)
    per_head = True
    written = "input"

    def concerned(self, scheme: Scheme) -> bool:
        return scheme.caches

    def refusal(self, module: Any, scheme: Scheme, around: Surroundings) -> Why | None:
        return _refusal(scheme)

    def missing(self, target: Target) -> Why | None:
        return _refusal(target.scheme) or super().missing(target)

    def tells(self, scheme: Scheme) -> tuple[str, ...]:
        return ("input",)

    def enter(self, module: Any) -> None:
        store_in_fp8(module)

    def leave(self, module: Any) -> None:
        store_as_before(module)

    def own_scales(self, target: Target) -> dict[str, torch.Tensor]:
        return {"input_scale": self.operand_scale(target, "input", per_head=True)}

    def expected(self, scheme: Scheme) -> tuple[str, ...]:
        return ("input_scale",)


def _refusal(scheme: Scheme) -> Why | None:
    """Why a `KVCache` module cannot be FP8 under a scheme: its model moves what it stores, but not scales."""
    if scheme.is_static:
        return None
    text = f"activation_scheme={scheme.activations!r}, but a KVCache has one static scale: calibrate it"
    return Why(Reason.UNFIT, text)


register_handler(StorageHandler())
