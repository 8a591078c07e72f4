"""The handlers of models' own attention: modules that look up an attention function by name, and those that multiply
themselves, as a whole or in helper modules."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
from torch import nn

from ..cache import layer_index
from ..config.inc import OPERATIONS
from ..modules.handler import Change, Reason, Row, Surroundings, Target, Why, register_handler
from ..scales import PerHead, Scheme
from .continuous_batching import fall_back_in_batches
from .detect import OTHER_STORAGE, STORES, Kind, attention_kind
from .function import NAME
from .function_mode import enter_mode, is_taken_as_it_is, leave_mode
from .handler import P_MAXABS, AttentionHandler, softmax_scale
from .implementation import chosen_implementation, running_implementation, use_ours
from .other_attention import why_other
from .own_path import own_path, own_paths
from .plan import plan_of

_OPERAND = re.compile(r"[qkpv]\d*$")


class WholeAttention(AttentionHandler):
    """Attention computed by one operator of ours: from query, key and value to the output."""

    per_head = True

    def missing(self, target: Target) -> Why | None:
        why, scheme = super().missing(target), target.scheme
        unseen = scheme.needs_ranges and scheme.rounds_attention and "q" not in target.ranges.kinds
        return why or (Why(Reason.NOT_SEEN) if unseen else None)

    def own_scales(self, target: Target) -> dict[str, torch.Tensor]:
        scheme, scales = target.scheme, dict[str, torch.Tensor]()
        if not scheme.rounds_attention:
            return scales
        if scheme.is_static:
            scales = {f"{kind}_scale": self.operand_scale(target, kind, per_head=True) for kind in "qkv"}
            if scheme.dataflow == "fused":
                scales["output_scale"] = self.operand_scale(target, "output")
        return scales | {"p_scale": softmax_scale(scheme)}

    def expected(self, scheme: Scheme) -> tuple[str, ...]:
        if not scheme.rounds_attention:
            return ()
        if not scheme.is_static:
            return ("p_scale",)
        output = ("output_scale",) if scheme.dataflow == "fused" else ()
        return ("p_scale", "q_scale", "k_scale", "v_scale", *output)


class InterfaceHandler(WholeAttention):
    """Modules that look up an attention function by name, as most of transformers' models do."""

    kind, way, writes = "attention interface", Kind.INTERFACE, True
    operations = OPERATIONS

    def refusal(self, module: Any, scheme: Scheme, around: Surroundings) -> Why | None:
        chosen = chosen_implementation(module, around.implementations)
        if chosen is not None:
            return Why(Reason.IMPLEMENTATION_CHOSEN, f"attn_implementation={chosen!r} was chosen")
        return super().refusal(module, scheme, around)

    def limit(self, module: Any, scheme: Scheme, around: Surroundings) -> tuple[dict[str, Any], str]:
        limits, text = super().limit(module, scheme, around)
        config = getattr(module, "config", None)
        name, why = own_paths(around.model).get(id(config), ("", ""))
        if config is None or not why:
            return limits, text
        shared = "" if own_path(cast(Hashable, type(module))) else f"it shares its configuration with {name}: "
        return {**limits, "rounds_attention": False}, f"attention in high precision: {shared}{why}"

    def around(self, model: nn.Module, modules: Mapping[str, nn.Module], others: Iterable[nn.Module]) -> list[Change]:
        changes = use_ours(model, others) if modules else []
        return [*changes, *fall_back_in_batches(model, changes)]

    def bypassed(self, module: Any) -> str:
        running, plan = running_implementation(module), plan_of(module)
        if running == NAME or plan is None or not plan.rounds:
            return ""
        back = f"model.set_attn_implementation({NAME!r}) brings FP8 attention back"
        return f"attn_implementation={running!r} runs; {back}"

    def own_scales(self, target: Target) -> dict[str, torch.Tensor]:
        scales = super().own_scales(target)
        return scales | scales_of_cache(target, scales, partial(self.operand_scale, target))

    def expected(self, scheme: Scheme) -> tuple[str, ...]:
        if scheme.caches and scheme.is_static and not scheme.rounds_attention:
            return ("k_scale", "v_scale")
        return super().expected(scheme)


class ProductsHandler(AttentionHandler):
    """Modules whose products of two activations are taken by torch's functions."""

    fixed: str  # the operands that a scale needs no calibration for

    def enter(self, module: Any) -> None:
        enter_mode(module)

    def leave(self, module: Any) -> None:
        leave_mode(module)

    def may_have(self, name: str, scheme: Scheme) -> bool:
        operand = _OPERAND.match(name.removesuffix("_scale")) is not None
        return (operand and scheme.rounds_attention and scheme.is_static) or super().may_have(name, scheme)

    def own_scales(self, target: Target) -> dict[str, torch.Tensor]:
        scheme = target.scheme
        if not (scheme.rounds_attention and scheme.is_static):
            return {}
        seen = sorted(kind for kind in target.ranges.kinds if _OPERAND.match(kind))
        kinds = seen if scheme.needs_ranges else list(self.fixed)
        return {f"{kind}_scale": self.operand_scale(target, kind, per_head=kind in "qkv") for kind in kinds}

    def row(self, module: Any) -> Row | None:
        row, plan = super().row(module), plan_of(module)
        if (
            row is None
            or plan is None
            or plan.scheme is None
            or not isinstance(plan.scheme.operands.granularity, PerHead)
        ):
            return row
        shared = [kind for kind in "qkv" if (scale := row.scales.get(f"{kind}_scale")) is not None and scale.ndim == 1]
        if not shared:
            return row
        return replace(row, remark=f"one scale for all heads of {', '.join(shared)}: where heads lie is not known")


class FunctionsHandler(ProductsHandler):
    """Modules that multiply and take the softmax in their own forward."""

    kind, way, writes, fixed = "attention functions", Kind.FUNCTIONS, True, "qkv"
    operations = OPERATIONS

    def reads_cache(self, module: Any, model: nn.Module) -> bool:
        return layer_index(module) is not None

    def missing(self, target: Target) -> Why | None:
        why = super().missing(target)
        unseen = target.scheme.needs_ranges and target.scheme.rounds_attention and not {*"qp"} & target.ranges.kinds
        return why or (Why(Reason.NOT_SEEN) if unseen else None)

    def tells(self, scheme: Scheme) -> tuple[str, ...]:
        return (*super().tells(scheme), "p")  # ConvBERT's first product follows a softmax, of a kernel

    def own_scales(self, target: Target) -> dict[str, torch.Tensor]:
        scales, scheme = super().own_scales(target), target.scheme
        if scheme.is_static and scheme.rounds_attention:  # the first product after a softmax may take something else
            p = target.ranges.largest("p") if "p" in target.ranges.kinds else None
            if p is None or bool(p <= P_MAXABS):
                scales["p_scale"] = softmax_scale(scheme)
        return scales | scales_of_cache(target, scales, partial(self.operand_scale, target))

    def expected(self, scheme: Scheme) -> tuple[str, ...]:
        return ()


class ProductHandler(ProductsHandler):
    """Helper modules that are one product, `Matmul` of model files for Gaudi."""

    kind, way, fixed, types = "attention product", Kind.PRODUCT, "qk", ("Matmul",)

    def reads_cache(self, module: Any, model: nn.Module) -> bool:
        return stores_keys(model)

    def tells(self, scheme: Scheme) -> tuple[str, ...]:
        return ("q",) if scheme.rounds_attention else ()  # else only what comes out of a cache is in FP8

    def scales_for(self, target: Target) -> dict[str, torch.Tensor]:
        scales = super().scales_for(target)
        if scales and target.model is not None and is_taken_as_it_is(target.module):
            scales["k_scale"] = _scale_of_codes(target.model.get_submodule(target.name.rpartition(".")[0]))
        return scales

    def expected(self, scheme: Scheme) -> tuple[str, ...]:
        return ("q_scale", "k_scale") if scheme.rounds_attention and scheme.is_static else ()


def _scale_of_codes(parent: nn.Module) -> torch.Tensor:
    """The scale of codes that a model makes itself and multiplies in a `Matmul`, by INC's attribute of its parent."""
    scale = getattr(parent, "scale_bf16_to_fp8", None)
    scale = torch.ones(1) if scale is None else torch.as_tensor(scale).detach().float().cpu().reshape(-1)[:1]
    return scale if bool(scale > 0) else torch.ones(1)


class UnsupportedHandler(AttentionHandler):
    """Attention that is known and not covered: the report says why."""

    def why(self, module: nn.Module) -> str:
        """Why a module is not covered."""
        raise NotImplementedError

    def find(self, model: nn.Module) -> dict[str, Any]:
        return {name: module for name, module in model.named_modules() if self.matches(module)}

    def refusal(self, module: Any, scheme: Scheme, around: Surroundings) -> Why | None:
        return Why(Reason.UNFIT, self.why(module))

    def converted(self, model: nn.Module) -> dict[str, Any]:
        return {}


class OtherAttentionHandler(UnsupportedHandler):
    """Attention of another kind than a softmax between two products."""

    kind = "other attention"

    def why(self, module: nn.Module) -> str:
        return why_other(type(module).__name__)

    def matches(self, module: nn.Module) -> bool:
        return attention_kind(module) is None and bool(self.why(module))

    def concerned(self, scheme: Scheme) -> bool:
        return scheme.rounds_attention


class OtherStorageHandler(UnsupportedHandler):
    """Modules called as those that store keys and values, and made otherwise."""

    kind = "other attention storage"

    def why(self, module: nn.Module) -> str:
        return (
            "it stores keys and values in its own way: only a KVCache with allocate() and update(), and a VLLMKVCache "
            "with fetch_from_cache(), become FP8"
        )

    def matches(self, module: nn.Module) -> bool:
        return type(module).__name__ in OTHER_STORAGE and attention_kind(module) not in STORES

    def concerned(self, scheme: Scheme) -> bool:
        return scheme.caches


def stores_keys(model: nn.Module) -> bool:
    """Whether a model has modules that store keys or values themselves."""
    return any(attention_kind(module) in STORES for module in model.modules())


def scales_of_cache(
    target: Target, scales: Mapping[str, torch.Tensor], scale: Callable[..., torch.Tensor]
) -> dict[str, torch.Tensor]:
    """What a static cache needs besides attention's own `scales`.

    Nothing where attention gets just what is cached, so that both share one scale.
    """
    ranges = target.ranges
    if not (target.scheme.caches and target.scheme.is_static):
        return {}
    if "k_cache" not in ranges.kinds:  # a module that does not cache, or a fixed scale
        return {f"{kind}_scale": scale(kind, per_head=True) for kind in "kv" if not scales}
    # Some models cache keys alone, beside values of size 0, which have no range: their scale is never used.
    cached = {kind: f"{kind}_cache" if f"{kind}_cache" in ranges.kinds else "k_cache" for kind in "kv"}
    if not scales:
        return {f"{kind}_scale": scale(name, per_head=name[0] == kind) for kind, name in cached.items()}
    same = all(
        f"{kind}_scale" in scales and ranges.largest(kind) == ranges.largest(name) for kind, name in cached.items()
    )
    return {} if same else {f"{kind}_cache_scale": scale(name) for kind, name in cached.items()}


for _handler in (
    OtherAttentionHandler(),
    OtherStorageHandler(),
    ProductHandler(),
    FunctionsHandler(),
    InterfaceHandler(),
):
    register_handler(_handler)
