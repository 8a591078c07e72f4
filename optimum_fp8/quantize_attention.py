"""What the steps of quantization do to attention modules: select, observe, give them scales and plans, undo."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import transformers
from torch import nn

from .cache import CacheScales, attach_cache, detach_cache, observe_caches, store_as_before, store_in_fp8
from .config import FP8Config
from .errors import FP8MeasurementError, FP8SelectionError
from .measure import Observers
from .modules.attention import NAME, AttentionPlan, plan_of, set_plan
from .modules.attention_scales import drop_scales, names_taken, scales_of, set_scales
from .modules.gaudi_operations import leave_sdpa, leave_softmax, override_sdpa, round_softmax
from .modules.overriding import override, stop_overriding
from .modules.recipe import AttentionRecipe, attention_recipe_for
from .quantize_attention_scales import scales_for, telling_kinds
from .selection_attention import (
    FUNCTIONS,
    FUSED,
    INTERFACE,
    PRODUCT,
    SOFTMAX,
    STORAGE,
    attention_kind,
    storage_refusal,
    telling_the_dtype,
)
from .state import FP8State, without

ATTENTION_RANGES = ("q", "k_cache")  # kinds that tell that attention was measured
# How a module of each kind is made to ask its plan, and left alone; those that call attention by name ask unprompted.
_ASKING: dict[str | None, tuple[Callable[[nn.Module], None], Callable[[nn.Module], None]]] = {
    FUNCTIONS: (override, stop_overriding),
    PRODUCT: (override, stop_overriding),
    SOFTMAX: (round_softmax, leave_softmax),
    FUSED: (override_sdpa, leave_sdpa),
    STORAGE: (store_in_fp8, store_as_before),
}


def start_observing_attention(model: nn.Module, state: FP8State) -> None:
    """Attach what measures attention's operands, and what is written to caches, to the selected attention modules."""
    observers = state.observers
    if observers is None or not state.config.method.activation.needs_range:
        return
    modules = selected_attention(model, state)
    for name, module in modules.items():
        by_head = attention_kind(module) in (INTERFACE, FUSED, STORAGE)
        see = observers.see_heads if by_head else observers.see_whole
        _follow(module, AttentionPlan(observe=partial(see, name), name=name))
        observers.add(_MeasuringPlan(module))
    use_implementation(model, state)
    if modules and state.config.kv_cache:
        observers.add(observe_caches(_writing(modules), partial(_see_cached, observers)))


def _follow(module: nn.Module, plan: AttentionPlan | None) -> None:
    """Have a module do what `plan` says; None: what it does by itself."""
    ask, leave = _ASKING.get(attention_kind(module), (None, None))
    if leave is not None:
        leave(module)
    set_plan(module, plan)
    if plan is not None and ask is not None:
        ask(module)


def _writing(modules: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """Those of the modules that may write to a cache of transformers."""
    return {name: module for name, module in modules.items() if attention_kind(module) in (INTERFACE, FUNCTIONS)}


def _see_cached(observers: Observers, name: str, key: torch.Tensor, value: torch.Tensor) -> None:
    for kind, x in (("k_cache", key), ("v_cache", value)):
        observers.see_heads(name, kind, x)


@dataclass
class _MeasuringPlan:
    """Takes a measuring plan off its module again, if it is still there."""

    module: nn.Module

    def remove(self) -> None:
        plan = plan_of(self.module)
        if plan is not None and plan.observe is not None:
            _follow(self.module, None)


def selected_attention(model: nn.Module, state: FP8State) -> dict[str, nn.Module]:
    """The selected attention modules by name."""
    return {decision.name: model.get_submodule(decision.name) for decision in state.attention if decision.selected}


def use_implementation(model: nn.Module, state: FP8State) -> None:
    """Let the models inside `model` that look up attention by name find ours, and remember what they had."""
    if not any(attention_kind(module) == INTERFACE for module in selected_attention(model, state).values()):
        return
    chosen = {decision.name for decision in state.attention if decision.reason.startswith("attn_implementation=")}
    configs = {id(module.config): module.config for name, module in model.named_modules() if name in chosen}
    for part in model.modules():
        config = getattr(part, "config", None)
        fits = isinstance(part, transformers.PreTrainedModel) and part._can_set_attn_implementation()
        if not fits and plan_of(part) is None or config is None or id(config) in configs:
            continue
        configs[id(config)] = config
        before = getattr(config, "_attn_implementation_internal", None)
        if before != NAME and (fits or attention_kind(part) != FUNCTIONS):
            state.implementations.append((config, before))
            config._attn_implementation_internal = NAME


def missing_ranges(model: nn.Module, state: FP8State, config: FP8Config) -> dict[str, str]:
    """Selected attention modules that cannot be converted for want of ranges, and why.

    Raises:
        FP8MeasurementError: calibration never reached some of them and the config does not ignore that, or
            `kv_cache` is on and nothing was written to a cache.
    """
    modules, seen = selected_attention(model, state), state.measurements.tensors
    refusal, missing = storage_refusal(config), dict[str, str]()
    if refusal is not None:
        missing = {name: refusal for name, module in modules.items() if attention_kind(module) == STORAGE}
    if not _static(config):
        return missing
    for name, module in modules.items():
        kinds, telling = {kind for owner, kind in seen if owner == name}, telling_kinds(module, config)
        if telling and not kinds.intersection(telling):
            missing[name] = "never reached by calibration"
        elif not kinds & {"q"} and config.attention and attention_kind(module) == FUNCTIONS:
            missing[name] = "none of its products was seen"
    unreached = [name for name, reason in missing.items() if reason == "never reached by calibration"]
    if unreached and not config.ignore_modules_wo_measures:
        raise FP8MeasurementError(
            f"{len(unreached)} attention modules were never reached by calibration, or multiply in a way that is not "
            f"seen, as einsum: {', '.join(unreached[:8])}"
            f"{', …' if len(unreached) > 8 else ''}: calibrate with data that reaches them, put them on the "
            "blocklist, or set ignore_modules_wo_measures=True; measurements made without attention=True or "
            "kv_cache=True do not hold their ranges"
        )
    cached = [(name, "input" if attention_kind(module) == STORAGE else "k_cache") for name, module in modules.items()]
    if config.kv_cache and modules and not any(written in seen for written in cached):
        raise FP8MeasurementError(
            "kv_cache=True, but calibration wrote nothing to a cache: calibrate with use_cache=True, or leave "
            "kv_cache out for a model that has no cache"
        )
    return missing


def _static(config: FP8Config) -> bool:
    return config.scheme in ("static", "auto") and config.method.activation.needs_range


def convert_attention(
    model: nn.Module, state: FP8State, config: FP8Config, missing: dict[str, str]
) -> Callable[[], None]:
    """Give every selected attention module its scales and its plan, and the model its FP8 cache.

    Nothing is changed if a scale cannot be made.

    Returns:
        what undoes all of it.
    """
    modules = {name: module for name, module in selected_attention(model, state).items() if name not in missing}
    scales = {name: scales_for(name, module, state.measurements, config) for name, module in modules.items()}
    for name, module in modules.items():
        if taken := names_taken(module, scales[name]):
            raise FP8SelectionError(
                f"{name}: a {type(module).__name__} has attributes of its own called {', '.join(taken)}, the names of "
                "our scales: put it on the blocklist"
            )
    before = [(module, plan_of(module), scales_of(module)) for module in modules.values()]
    recipe, known = attention_recipe_for(config), len(state.implementations)
    first = telling_the_dtype(model, modules.values())
    for name, module in modules.items():
        device = _device_of(model, name)
        moved = {key: scale.to(device) for key, scale in scales[name].items()}
        set_scales(module, moved, as_buffers=module in first)
    start_attention(modules, recipe, config.kv_cache)
    use_implementation(model, state)

    def undo() -> None:
        detach_cache(modules.values())
        while len(state.implementations) > known:
            changed, implementation = state.implementations.pop()
            changed._attn_implementation_internal = implementation
        for module, plan, old in before:
            _follow(module, None)
            set_scales(module, old, as_buffers=module in first) if old else drop_scales(module)
            _follow(module, plan)

    return undo


def _device_of(model: nn.Module, name: str) -> torch.device:
    """Where a module is: the parameters of it, or of the nearest module around it, tell."""
    parts = name.split(".")
    around = (model.get_submodule(".".join(parts[:depth])) for depth in range(len(parts), -1, -1))
    return next((p.device for module in around for p in module.parameters()), torch.device("cpu"))


def start_attention(modules: dict[str, nn.Module], recipe: AttentionRecipe, kv_cache: bool) -> None:
    """Let attention modules that have their scales compute by `recipe`, over FP8 caches if `kv_cache` says so."""
    for name, module in modules.items():
        _follow(module, AttentionPlan(recipe, name=name))
    if kv_cache:
        attach_cache(_writing(modules).values(), cache_scales)


def cache_scales(module: nn.Module) -> CacheScales | None:
    """How a converted attention module's keys and values are stored; None: in high precision."""
    plan = plan_of(module)
    if plan is None or plan.recipe is None:
        return None
    recipe, scales = plan.recipe, scales_of(module)
    k, v = (scales.get(f"{name}_cache_scale", scales.get(f"{name}_scale")) for name in "kv")
    if recipe.rule is not None or k is None or v is None:
        return CacheScales(recipe.fmt, rule=recipe.rule)
    return CacheScales(recipe.fmt, k, v)


def restore_attention(model: nn.Module, state: FP8State | None) -> None:
    """Put attention back to what it was before any step."""
    modules = [module for module in model.modules() if plan_of(module) is not None or scales_of(module)]
    detach_cache(modules)
    for module in modules:
        _follow(module, None)
        drop_scales(module)
    for config, before in state.implementations if state is not None else ():
        config._attn_implementation_internal = before


def without_missing(state: FP8State, missing: dict[str, str]) -> list[Any]:
    """The decisions about attention with what could not be converted left out."""
    return without(state.attention, missing)
