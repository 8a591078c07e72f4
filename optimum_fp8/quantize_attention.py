"""What the steps of quantization do to attention modules: select, observe, give them scales and plans, undo."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import transformers
from torch import nn

from .cache import CacheScales, attach_cache, detach_cache, observe_caches
from .config import FP8Config
from .errors import FP8MeasurementError, FP8SelectionError
from .measure import Measurements, Observers
from .modules.attention import NAME, AttentionPlan, plan_of, set_plan
from .modules.attention_scales import drop_scales, names_taken, scales_of, set_scales
from .modules.overriding import override, stop_overriding
from .modules.recipe import AttentionRecipe, attention_recipe_for
from .scales import activation_scale
from .selection_attention import FUNCTIONS, attention_kind, telling_the_dtype
from .state import FP8State, without

P_MAXABS = 1.0  # a softmax's output is never larger: its range needs no data
ATTENTION_RANGES = ("q", "k_cache")  # kinds that tell that attention was measured
_INTERFACE_KINDS = ("q", "k", "v")
_PRODUCT = re.compile(r"[qkpv]\d*$")


def start_observing_attention(model: nn.Module, state: FP8State) -> None:
    """Attach what measures attention's operands, and what is written to caches, to the selected attention modules."""
    observers = state.observers
    if observers is None or not state.config.method.activation.needs_range:
        return
    modules = selected_attention(model, state)
    for name, module in modules.items():
        if attention_kind(module) == FUNCTIONS:
            set_plan(module, AttentionPlan(observe=partial(observers.see_whole, name)))
            override(module)
        else:
            set_plan(module, AttentionPlan(observe=partial(observers.see_heads, name)))
        observers.add(_MeasuringPlan(module))
    use_implementation(model, state)
    if modules and state.config.kv_cache:
        observers.add(observe_caches(modules, partial(_see_cached, observers)))


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
            stop_overriding(self.module)
            set_plan(self.module, None)


def selected_attention(model: nn.Module, state: FP8State) -> dict[str, nn.Module]:
    """The selected attention modules by name."""
    return {decision.name: model.get_submodule(decision.name) for decision in state.attention if decision.selected}


def use_implementation(model: nn.Module, state: FP8State) -> None:
    """Let the models inside `model` that look up attention by name find ours, and remember what they had."""
    if not any(decision.selected for decision in state.attention):
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
    if not _static(config):
        return {}
    modules, seen = selected_attention(model, state), state.measurements.tensors
    missing: dict[str, str] = {}
    for name, module in modules.items():
        kinds = {kind for owner, kind in seen if owner == name}
        if not kinds.intersection(ATTENTION_RANGES):
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
    if config.kv_cache and modules and not any((name, "k_cache") in seen for name in modules):
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
    scales = {name: _scales(name, module, state.measurements, config) for name, module in modules.items()}
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
        device = next((p.device for p in module.parameters()), torch.device("cpu"))
        moved = {key: scale.to(device) for key, scale in scales[name].items()}
        set_scales(module, moved, as_buffers=module in first)
    start_attention(list(modules.values()), recipe, config.kv_cache)
    use_implementation(model, state)

    def undo() -> None:
        detach_cache(modules.values())
        while len(state.implementations) > known:
            changed, implementation = state.implementations.pop()
            changed._attn_implementation_internal = implementation
        for module, plan, old in before:
            stop_overriding(module)
            set_scales(module, old, as_buffers=module in first) if old else drop_scales(module)
            set_plan(module, plan)
            if plan is not None and attention_kind(module) == FUNCTIONS:
                override(module)

    return undo


def start_attention(modules: list[nn.Module], recipe: AttentionRecipe, kv_cache: bool) -> None:
    """Let attention modules that have their scales compute by `recipe`, over FP8 caches if `kv_cache` says so."""
    for module in modules:
        stop_overriding(module)
        set_plan(module, AttentionPlan(recipe))
        if attention_kind(module) == FUNCTIONS and recipe.rounds:
            override(module)
    if kv_cache:
        attach_cache(modules, cache_scales)


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
        stop_overriding(module)
        drop_scales(module)
        set_plan(module, None)
    for config, before in state.implementations if state is not None else ():
        config._attn_implementation_internal = before


def without_missing(state: FP8State, missing: dict[str, str]) -> list[Any]:
    """The decisions about attention with what could not be converted left out."""
    return without(state.attention, missing)


def _scales(name: str, module: nn.Module, measurements: Measurements, config: FP8Config) -> dict[str, torch.Tensor]:
    """The scales a module gets, by parameter name."""
    ranges, per_head = measurements.maxabs, measurements.maxabs_per_head

    def scale(kind: str, heads: bool = False) -> torch.Tensor:
        maxabs = ranges(name, kind) if config.method.activation.needs_range else torch.zeros(())
        assert maxabs is not None  # modules without ranges have been sorted out
        by_head = per_head(name, kind) if heads and config.attention_granularity == "head" else None
        result = _activation_scale(maxabs if by_head is None else by_head, config)
        return result if by_head is None else result.reshape(-1, 1, 1)

    functions, static = attention_kind(module) == FUNCTIONS, config.scheme in ("static", "auto")
    scales: dict[str, torch.Tensor] = {}
    if config.attention and static and not functions:
        scales = {f"{kind}_scale": scale(kind, heads=True) for kind in _INTERFACE_KINDS}
        if config.attention_dataflow == "fused" and not config.use_qdq:
            scales["output_scale"] = scale("output")
    elif config.attention and static:
        seen = [kind for owner, kind in measurements.tensors if owner == name and _PRODUCT.match(kind)]
        seen = sorted(seen) if config.method.activation.needs_range else list(_INTERFACE_KINDS)
        scales = {f"{kind}_scale": scale(kind) for kind in seen}
    measured_p = ranges(name, "p")  # of modules whose first product after the softmax may take something else
    if config.attention and (not functions or static) and (measured_p is None or measured_p <= P_MAXABS):
        scales["p_scale"] = _activation_scale(torch.tensor(P_MAXABS), config)
    if config.kv_cache and static:
        scales |= _scales_of_cache(name, scales, measurements, scale)
    return scales


def _scales_of_cache(
    name: str, scales: dict[str, torch.Tensor], measurements: Measurements, scale: Callable[..., torch.Tensor]
) -> dict[str, torch.Tensor]:
    """What the cache needs besides: nothing where attention gets just what is cached, so that both share one scale."""
    if (name, "k_cache") not in measurements.tensors:  # a module that does not cache, or a fixed scale
        return {f"{kind}_scale": scale(kind, heads=True) for kind in "kv" if not scales}
    if not scales:
        return {f"{kind}_scale": scale(f"{kind}_cache", heads=True) for kind in "kv"}
    same = all(
        f"{kind}_scale" in scales and measurements.maxabs(name, kind) == measurements.maxabs(name, f"{kind}_cache")
        for kind in "kv"
    )
    return {} if same else {f"{kind}_cache_scale": scale(f"{kind}_cache") for kind in "kv"}


def _activation_scale(maxabs: torch.Tensor, config: FP8Config) -> torch.Tensor:
    return activation_scale(
        maxabs,
        method=config.scale_method,
        target=config.resolved_target,
        fp8_config=config.fp8_config,
        hp_dtype=config.hp_dtype,
        backoff=config.input_backoff,
    )
