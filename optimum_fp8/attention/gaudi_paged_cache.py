"""`VLLMKVCache` modules in FP8: they store keys, or values, in blocks of a cache that is handed to them.

Their own methods do all the storing and fetching, of codes: what is written is rounded with the module's `input_scale`,
or with scales of its own, one a token and head, that are written and fetched as the codes are. What is handed out are
codes with their scale, for a product to take as they are. Who allocates the cache decides: one of FP8 holds codes.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from .. import ops
from ..cache import FP8Tensor, cache_record, start_record
from ..errors import FP8StateError
from ..formats import is_fp8
from ..modules.handler import Surroundings, Target, Why, register_handler
from ..scales import Scheme, inf_as_nan
from .detect import Kind
from .gaudi_cache import HIGH_PRECISION, StorageHandler, as_stored
from .handler import AttentionHandler
from .plan import AttentionPlan, plan_of
from .scale_module import scale_of

_FETCH = "fetch_from_cache"  # and all methods whose names begin so
_SCALES = "_optimum_fp8_token_scales"
_ACTS_AS = "_optimum_fp8_acts_as"


def store_in_fp8(module: Any) -> None:
    """Have a `VLLMKVCache` store codes, or have what is written observed, as its plan says."""
    store_as_before(module)
    start_record(module)
    module.__dict__["forward"] = partial(_write, module, module.forward)
    for name in dir(type(module)):
        if name.startswith(_FETCH):
            module.__dict__[name] = partial(_fetch, module, getattr(module, name))


def store_as_before(module: Any) -> None:
    """Have a `VLLMKVCache` store in high precision again; a cache that holds codes is its owner's."""
    for name in [name for name, each in vars(module).items() if getattr(each, "func", None) in (_write, _fetch)]:
        del module.__dict__[name]
    module.__dict__.pop(_SCALES, None)
    module.__dict__.pop(_ACTS_AS, None)


def _write(
    module: Any, original: Callable[..., Any], input: torch.Tensor | None, cache: Any, *args: Any, **kwargs: Any
) -> Any:
    """Store `input` in `cache`, and hand out the cache as attention is to use it.

    Args:
        input: `[tokens, heads, size]`, keys or values; None: nothing is written, as in steps of cross-attention.
        cache: `[slots, heads, size]`: codes, what this function returned before, or in high precision.
        args: further arguments of the module's forward: where to write, and perhaps a tensor for `scales`.
    """
    plan = plan_of(module)
    if plan is not None and plan.observe is not None and input is not None:
        plan.observe("input", input.transpose(0, 1).unsqueeze(0) if input.ndim == 3 else input)
    if plan is None or plan.scheme is None:
        return original(input, cache, *args, **kwargs)
    record, scheme = cache_record(module), plan.scheme
    cache = cache.codes if isinstance(cache, FP8Tensor) else cache
    given = _given_scales(inspect.signature(original).bind(input, cache, *args, **kwargs).arguments)
    if input is None:
        return _as_fp8(module, cache, _scale(module, scheme, cache, given)) if is_fp8(cache.dtype) else cache
    module.__dict__[_ACTS_AS] = input.dtype
    codes, scale = _rounded(module, scheme, input, given)
    if not is_fp8(cache.dtype):
        record.refused[HIGH_PRECISION] = record.refused.get(HIGH_PRECISION, 0) + 1
        return original(ops.cast_from_fp8(codes, scale, input.dtype), cache, *args, **kwargs)
    _require_same_format(plan, cache)
    record.layers = 1
    if not scheme.is_static:
        kept = _kept_scales(module, cache, given)
        original(scale.to(kept.dtype), kept, *args, **kwargs)
    stored = original(as_stored(codes), as_stored(cache), *args, **kwargs).view(cache.dtype)
    return _as_fp8(module, stored, _scale(module, scheme, cache, given))


def _fetch(module: Any, original: Callable[..., Any], cache: Any, *args: Any, **kwargs: Any) -> Any:
    """Blocks of a cache `[blocks, block size, heads, size]`, as codes with their scale where it holds codes."""
    plan = plan_of(module)
    held = cache.codes if isinstance(cache, FP8Tensor) else cache
    if plan is None or plan.scheme is None or not is_fp8(held.dtype):
        return original(cache, *args, **kwargs)
    _require_same_format(plan, held)
    codes = original(as_stored(held), *args, **kwargs).view(held.dtype)
    if plan.scheme.is_static:
        return _as_fp8(module, codes, _scale(module, plan.scheme, held, None))
    if isinstance(cache, FP8Tensor):
        scales = cache.scale
    else:
        given = _given_scales(inspect.signature(original).bind(cache, *args, **kwargs).arguments)
        scales = _kept_scales(module, held, given).float()
    return _as_fp8(module, codes, original(scales, *args, **kwargs))


def _rounded(
    module: Any, scheme: Scheme, x: torch.Tensor, given: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes of `x` and their scale: the module's, or `[tokens, heads, 1]` from `x` itself, as `given` can hold it."""
    if scheme.is_static:
        scale = _static_scale(module)
    else:
        scale = scheme.dynamic_scale(x, scheme.operands)
        scale, x = scale if given is None else scale.to(given.dtype).float(), inf_as_nan(x)
    return ops.cast_to_fp8(x, scale, scheme.fmt.dtype, scheme.fmt.full_scale), scale


def _static_scale(module: Any) -> torch.Tensor:
    scale = scale_of(module, "input_scale")
    assert scale is not None  # a static cache is converted with a scale only
    return scale if scale.numel() == 1 else scale.flatten(1)  # (heads, 1): a slot has its heads behind it


def _scale(module: Any, scheme: Scheme, cache: torch.Tensor, given: torch.Tensor | None) -> torch.Tensor:
    """The scale of all of a cache."""
    return _static_scale(module) if scheme.is_static else _kept_scales(module, cache, given).float()


def _given_scales(arguments: dict[str, Any]) -> torch.Tensor | None:
    """The tensor that a caller keeps scales of tokens in: of values vLLM has a second one, which is not needed."""
    scales = arguments.get("scales")
    return scales[0] if isinstance(scales, (tuple, list)) else scales


def _kept_scales(module: Any, cache: torch.Tensor, given: torch.Tensor | None) -> torch.Tensor:
    """Scales of tokens, `[slots, heads, 1]` as the cache is laid out: the caller's, or the module's own."""
    shape = (*cache.shape[:-1], 1)
    if given is not None:
        return given.view(shape)
    kept = module.__dict__.get(_SCALES)
    if kept is None or kept.numel() != cache.numel() // cache.shape[-1] or kept.device != cache.device:
        kept = module.__dict__[_SCALES] = torch.ones(shape, device=cache.device)
    return kept.view(shape)


def _as_fp8(module: Any, codes: torch.Tensor, scale: torch.Tensor) -> FP8Tensor:
    plan = plan_of(module)
    assert plan is not None and plan.scheme is not None
    return FP8Tensor(codes, scale, module.__dict__.get(_ACTS_AS, plan.scheme.hp_dtype))


def _require_same_format(plan: AttentionPlan, cache: torch.Tensor) -> None:
    assert plan.scheme is not None
    if cache.dtype != plan.scheme.fmt.dtype:
        raise FP8StateError(
            f"{plan.name} was handed a cache of {cache.dtype}, and stores {plan.scheme.fmt.dtype}: allocate it so, or "
            "in high precision"
        )


class PagedHandler(StorageHandler):
    """`VLLMKVCache` modules: they store keys, or values, in a cache that is handed to them."""

    kind, way, types = "attention paged storage", Kind.PAGED, ("VLLMKVCache",)

    def refusal(self, module: Any, scheme: Scheme, around: Surroundings) -> Why | None:
        return None

    def missing(self, target: Target) -> Why | None:
        return AttentionHandler.missing(self, target)

    def enter(self, module: nn.Module) -> None:
        store_in_fp8(module)

    def leave(self, module: nn.Module) -> None:
        store_as_before(module)

    def own_scales(self, target: Target) -> dict[str, torch.Tensor]:
        return super().own_scales(target) if target.scheme.is_static else {}

    def expected(self, scheme: Scheme) -> tuple[str, ...]:
        return ("input_scale",) if scheme.is_static else ()


register_handler(PagedHandler())
