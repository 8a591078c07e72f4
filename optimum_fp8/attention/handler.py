"""AttentionHandler: what all ways of computing attention have in common when they are observed and converted."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import transformers
from torch import nn

from .. import ops
from ..cache import CacheScales, attach_cache, cache_record, detach_cache, layer_index, observe_caches
from ..errors import FP8CheckpointError, FP8MeasurementError
from ..measure import Observers
from ..modules.handler import (
    Conversion,
    Family,
    FitWeight,
    ModuleHandler,
    Quantize,
    Reason,
    Row,
    Surroundings,
    Target,
    Why,
)
from ..scales import PerHead, Scheme
from .cache_ranges import with_ranges_of_caches
from .detect import STORES, Kind, attention_kind, attention_modules
from .plan import AttentionPlan, plan_of, set_plan
from .scale_module import CHILD, scales_of, set_scales

_BY_HEAD = ("q_scale", "k_scale", "v_scale", "input_scale")
_UNSEEN = "unseen"  # measured of modules that ran, and did not compute attention in a way that is observed
P_MAXABS = 1.0  # a softmax's output is never larger: its range needs no data


def _check_caches(targets: Iterable[Target]) -> None:
    """Refuse ranges of caches that nothing was written to.

    Raises:
        FP8MeasurementError: what to do about it.
    """
    wanting = [target for target in targets if target.scheme.caches and target.scheme.needs_ranges]
    written = [target.handler.written in target.ranges.kinds for target in wanting]  # type: ignore[attr-defined]
    if wanting and not any(written) and not any(cache_record(target.module).refused for target in wanting):
        raise FP8MeasurementError(
            "kv_cache=True, but calibration wrote nothing to a cache: calibrate with use_cache=True, or leave "
            "kv_cache out for a model that has no cache (a file of INC's: put KVCache on its blocklist)"
        )


ATTENTION = Family(
    "attention",
    "attention modules",
    "calibrate with data that reaches them, put them on the blocklist, or set ignore_modules_wo_measures=True; "
    "measurements made without attention=True or kv_cache=True do not hold their ranges",
    keys="attention and kv_cache",
    replaced=False,
    check=_check_caches,
)


class AttentionHandler(ModuleHandler):
    """One way of computing attention, or one operation of it.

    Attributes:
        way: the kind of module as `detect` tells it.
        per_head: whether what it is given is `[batch, heads, length, size]`.
        writes: whether it may write to a cache of transformers.
        written: the measurement that tells that it wrote to a cache.
    """

    family = ATTENTION
    way: Kind
    per_head = False
    writes = False
    written = "k_cache"

    def matches(self, module: nn.Module) -> bool:
        return attention_kind(module) is self.way

    def find(self, model: nn.Module) -> dict[str, Any]:
        return {name: model.get_submodule(name) for name, way in attention_modules(model).items() if way is self.way}

    def concerned(self, scheme: Scheme) -> bool:
        return scheme.rounds_attention or scheme.caches

    def refusal(self, module: Any, scheme: Scheme, around: Surroundings) -> Why | None:
        if scheme.rounds_attention or self.reads_cache(module, around.model):
            return None
        return Why(Reason.UNFIT, "it writes to no cache")

    def limit(self, module: Any, scheme: Scheme, around: Surroundings) -> tuple[dict[str, Any], str]:
        if scheme.caches and around.implied and not _may_cache(around.model):
            return {"caches": False}, "" if scheme.rounds_attention else "the model does not generate: it has no cache"
        if scheme.caches and not scheme.caches_windows and has_sliding_window(module):
            return {"caches": False}, "cache in high precision: kv_cache_skip='sliding'"
        return {}, ""

    # --- what each way answers for itself -------------------------------------------------------------------------

    def reads_cache(self, module: Any, model: nn.Module) -> bool:
        """Whether an FP8 cache concerns a module at all."""
        return True

    def tells(self, scheme: Scheme) -> tuple[str, ...]:
        """Measurements of which at least one tells that calibration has reached a module; none: it needs no ranges."""
        return ("q", "k_cache")

    def scales_for(self, target: Target) -> dict[str, torch.Tensor]:
        return self.own_scales(with_ranges_of_caches(target))

    def own_scales(self, target: Target) -> dict[str, torch.Tensor]:
        """`scales_for`, given the ranges of the caches that the module reads in place of its own."""
        raise NotImplementedError

    def expected(self, scheme: Scheme) -> tuple[str, ...]:
        """Names of the scales that a module's operators cannot do without."""
        raise NotImplementedError

    def may_have(self, name: str, scheme: Scheme) -> bool:
        """Whether a module may have a scale called `name` besides those expected."""
        caches = scheme.caches and scheme.is_static and self.writes
        return caches and name in ("k_scale", "v_scale", "k_cache_scale", "v_cache_scale")

    def enter(self, module: Any) -> None:
        """Have a module ask its plan at each call."""

    def leave(self, module: Any) -> None:
        """Have a module compute on its own again."""

    # --- the steps ------------------------------------------------------------------------------------------------

    def follow(self, module: nn.Module, plan: AttentionPlan | None) -> None:
        """Have a module do what `plan` says; None: what it does by itself."""
        self.leave(module)
        set_plan(module, plan)
        if plan is not None:
            self.enter(module)

    def observe(self, target: Target, observers: Observers) -> None:
        if not target.scheme.needs_ranges:
            return
        observe = observers.observe_per_head if self.per_head else observers.observe
        rounds = target.scheme.rounds_attention
        plan = AttentionPlan(
            observe=partial(observe, target.name),
            name=target.name,
            rounds=rounds,
            observe_per_head=partial(observers.observe_per_head, target.name),
        )
        self.follow(target.module, plan)
        observers.add(_MeasuringPlan(self, target.module))
        observers.add(target.module.register_forward_hook(partial(_note_unseen, observers, target)))
        if target.scheme.caches and self.writes:
            observers.add(observe_caches({target.name: target.module}, partial(_observe_cached, observers)))

    def missing(self, target: Target) -> Why | None:
        tells = self.tells(target.scheme) if target.scheme.needs_ranges else ()
        if tells and not target.ranges.kinds.intersection(tells):
            return Why(Reason.NOT_SEEN if _UNSEEN in target.ranges.kinds else Reason.NEVER_REACHED)
        return None

    def convert(self, target: Target, model: nn.Module, quantize: Quantize) -> Conversion:
        module, before = target.module, (plan_of(target.module), scales_of(target.module))
        device = _device_of(model, target.name)
        scales = {name: scale.to(device) for name, scale in self.scales_for(target).items()}

        def apply() -> None:
            set_scales(module, scales)
            self.loaded(target)

        def undo() -> None:
            plan, old_scales = before
            detach_cache([module])
            self.follow(module, None)
            set_scales(module, old_scales)
            self.follow(module, plan)

        return Conversion(apply=apply, undo=undo)

    def converted(self, model: nn.Module) -> dict[str, Any]:
        named = model.named_modules()
        return {name: module for name, module in named if _is_converted(module) and self.matches(module)}

    def restore(self, module: Any, dtype: torch.dtype | None = None) -> nn.Module | None:
        detach_cache([module])
        self.follow(module, None)
        set_scales(module, {})
        return None

    def expect(self, target: Target, saved: Mapping[str, tuple[int, ...]] | None) -> nn.Module | None:
        if saved is None:
            return None
        expected, by_head = self.expected(target.scheme), isinstance(target.scheme.operands.granularity, PerHead)
        shapes = dict.fromkeys(expected, (1,)) | dict(saved)
        for name, shape in shapes.items():
            if name not in expected and not self.may_have(name, target.scheme):
                raise FP8CheckpointError(
                    f"{target.name}.{CHILD}.{name} is in the checkpoint, but its configuration has no such scale "
                    f"({target.scheme.of_attention}): the checkpoint was edited or mixed from others, save it again"
                )
            if shape != (1,) and not (by_head and name in _BY_HEAD and shape[1:] == (1, 1)):
                raise FP8CheckpointError(
                    f"{target.name}.{CHILD}.{name} has shape {tuple(shape)} in the checkpoint, expected (1,)"
                    f"{' or (heads, 1, 1)' if by_head and name in _BY_HEAD else ''}: it was not saved so"
                )
        set_scales(target.module, {name: torch.full(shape, torch.nan, device="meta") for name, shape in shapes.items()})
        return None

    def loaded(self, target: Target) -> None:
        self.follow(target.module, AttentionPlan(target.scheme, name=target.name))
        plan_of(target.module).record.watch(*scales_of(target.module).values())  # type: ignore[union-attr]
        if target.scheme.caches and self.writes:
            attach_cache([target.module], cache_scales)

    def state(self, module: Any) -> dict[str, torch.Tensor]:
        return {f"{CHILD}.{name}": scale for name, scale in scales_of(module).items()}

    def run_time_scales(self, module: Any) -> dict[str, torch.Tensor]:
        return scales_of(module)

    def rescale(self, module: Any, scales: Mapping[str, torch.Tensor]) -> None:
        before = scales_of(module)
        set_scales(module, {name: scale.to(before[name].device) for name, scale in scales.items()})

    def rescheme(self, target: Target, fit: FitWeight) -> None:
        assert target.model is not None
        module, device = target.module, _device_of(target.model, target.name)
        scales = {name: scale.to(device) for name, scale in self.scales_for(target).items()}
        detach_cache([module])
        set_scales(module, scales)
        self.loaded(target)

    def pack(self, module: Any) -> None:
        plan = plan_of(module)
        if plan is None or plan.scheme is None:
            return
        known = False
        for scale in scales_of(module).values():
            packing = ops.packing_for(scale.device)
            if packing is None or not packing.constants:
                continue
            known = True
            ops.keep_inverse(scale)
            if plan.scheme.constant_scales:
                ops.mark_constant(scale, plan.scheme.fmt.hardware_scales)
        caches = cache_scales(module) if known and plan.scheme.caches else None
        if caches is not None:
            caches.check(plan.name)  # which is not left to the first forward pass: none is to read a value

    def row(self, module: Any) -> Row | None:
        plan = plan_of(module)
        if plan is None or plan.scheme is None:
            return None
        scheme, caches = plan.scheme, cache_record(module)
        if self.bypassed(module):
            scheme = replace(scheme, rounds_attention=False)
        activations = "static" if scheme.is_static else "dynamic"
        if not scheme.rounds_attention:
            activations = "cache only" if scheme.caches else ""
        scales, refused = scales_of(module), dict(caches.refused)
        return Row(activations, plan.record, scheme.of_attention, scales, caches.layers, refused)

    # --- scales ---------------------------------------------------------------------------------------------------

    def operand_scale(self, target: Target, kind: str, *, per_head: bool = False) -> torch.Tensor:
        """The static scale of an operand of attention: `(1,)`, or `(heads, 1, 1)` where the scheme wants it."""
        scheme, ranges = target.scheme, target.ranges
        if not scheme.needs_ranges:
            return scheme.static_scale(torch.zeros(()), scheme.operands)
        by_head = None
        if per_head and isinstance(scheme.operands.granularity, PerHead):
            by_head = ranges.per_head(kind)
        if by_head is None:
            return target.static_scale(kind, scheme.operands)
        return scheme.static_scale(by_head, scheme.operands).reshape(-1, 1, 1)


def softmax_scale(scheme: Scheme) -> torch.Tensor:
    """The scale of a softmax's output, `(1,)`."""
    return scheme.static_scale(torch.tensor(P_MAXABS), scheme.probabilities)


def cache_scales(module: nn.Module) -> CacheScales | None:
    """How a converted attention module's keys and values are stored; None: in high precision."""
    plan = plan_of(module)
    if plan is None or plan.scheme is None:
        return None
    scheme, scales = plan.scheme, scales_of(module)
    k, v = (scales.get(f"{name}_cache_scale", scales.get(f"{name}_scale")) for name in "kv")
    if not scheme.is_static:
        return CacheScales(scheme.fmt, rule=scheme.operands, hp_dtype=scheme.hp_dtype)
    if k is None or v is None:
        return CacheScales(scheme.fmt)
    return CacheScales(scheme.fmt, k, v)


def _observe_cached(observers: Observers, name: str, key: torch.Tensor, value: torch.Tensor) -> None:
    for kind, x in (("k_cache", key), ("v_cache", value)):
        observers.observe_per_head(name, kind, x)


def _note_unseen(observers: Observers, target: Target, module: nn.Module, args: Any, output: Any) -> None:
    """After the forward of a module: remember that it ran, where nothing of it was seen."""
    seen = {kind for name, kind in observers.measurements.tensors if name == target.name}
    if not seen:
        observers.observe(target.name, _UNSEEN, torch.ones(1))


def _may_cache(model: nn.Module) -> bool:
    """Whether a model stores keys and values as it generates."""
    return any(
        attention_kind(part) in STORES or (isinstance(part, transformers.PreTrainedModel) and part.can_generate())
        for part in model.modules()
    )


def has_sliding_window(module: Any) -> bool:
    """Whether a module attends to a window or a chunk of keys: as `layer_types` of its configuration says, or where
    that has none, `sliding_window` of the module or of its configuration."""
    config, index = getattr(module, "config", None), layer_index(module)
    types = getattr(config, "layer_types", None)
    if types and index is not None and index < len(types):
        return types[index].startswith(("sliding", "chunked", "hybrid_sliding"))
    return bool(getattr(module, "sliding_window", getattr(config, "sliding_window", None)))


def _is_converted(module: nn.Module) -> bool:
    return plan_of(module) is not None or bool(scales_of(module))


def _device_of(model: nn.Module, name: str) -> torch.device:
    """Where a module is: the parameters of it, or of the nearest module around it, tell."""
    parts = name.split(".")
    around = (model.get_submodule(".".join(parts[:depth])) for depth in range(len(parts), -1, -1))
    return next((p.device for module in around for p in module.parameters()), torch.device("cpu"))


@dataclass
class _MeasuringPlan:
    """Takes a measuring plan off its module again, if it is still there."""

    handler: AttentionHandler
    module: nn.Module

    def remove(self) -> None:
        plan = plan_of(self.module)
        if plan is not None and plan.observe is not None:
            self.handler.follow(self.module, None)
