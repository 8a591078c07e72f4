"""Which modules are quantized, how each of them, and why each of the others is not."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from ..config import FP8Config
from ..config.inc import INC_TYPES_NOT_THERE
from ..errors import FP8SelectionError, nearest
from ..modules.fused_layout import layout_of
from ..modules.handler import ModuleHandler, Reason, Surroundings, Why, find_all, handlers
from ..scales import Scheme
from .decision import Decision, leave_out
from .default_skips import default_skips, measured_skips
from .diffusion_ends import diffusion_ends
from .idle import warn_of_idle_entries
from .operations import allowlist_tells, helper_names, limits_by_lists
from .routers import routers, warn_of_bare_routers
from .schemes import scheme_for
from .weight_reads import first_modules, read_by_owner

logger = logging.getLogger(__name__)


def select(model: nn.Module, config: FP8Config, implementations: Mapping[int, str] | None = None) -> list[Decision]:
    """Decide about every module of `model` that is of a known kind and that the configuration is about.

    Args:
        model: the model, in high precision.
        config: what to quantize and how.
        implementations: attention implementations that a user chose while loading, by `id` of the configuration.

    Raises:
        FP8SelectionError: a pattern matches no module (a warning for INC's files), a weight is quantized already, or
            nothing is left to quantize.
    """
    found, around = find_all(model), Surroundings(model, implementations or {}, config.lenient)
    if "" in found and found[""][1].family.replaced:
        raise FP8SelectionError(f"a {type(model).__name__} cannot replace itself: wrap it, as nn.Sequential(layer)")
    _check_patterns(model, config, found)
    schemes, in_config = schemes_of(model, found, config), config_names(model, found)
    known, found = found, of_kinds_asked_for(found, schemes)
    skipped, unfit, aliases = _skipped(model, config, found), _unfit_modules(model), all_names(model)
    routing = set() if config.quantize_routers else routers(model)
    if config.quantize_routers:
        warn_of_bare_routers(model)
    decisions = []
    for name, (module, handler) in found.items():
        names = aliases[module]
        why = _listed(names, module, config)
        scheme, limits, selected = limited(handler, module, schemes[name], around, names, config)
        if why is None and selected.reason is not Reason.SELECTED:
            why = selected
        why = why or handler.refusal(module, scheme, around) or unfit.get(name)
        if (why is None or why.reason is Reason.CODES) and handler.family.replaced:
            why = _left_out(names, module, config, skipped, routing) or why
        elif why is None and not handler.operations and allowlist_tells(config):
            why = _not_allowed(names, module, config)
        why = why or selected
        types = type_names(module)
        decisions.append(Decision(name, type(module).__name__, why, handler, scheme, types, in_config[name], limits))
    decisions = _without_bypassed(model, decisions)
    _refuse_codes(decisions)
    _refuse_nothing(model, decisions)
    _warn_of_nothing_found(model, decisions, config)
    whys, not_asked = {decision.name: decision.why for decision in decisions}, Why(Reason.NOT_ASKED_FOR)
    entries = [(in_config[name], type_names(each), whys.get(name, not_asked)) for name, (each, _) in known.items()]
    warn_of_idle_entries(entries, {kind for module in aliases for kind in type_names(module)}, config)
    return decisions


def limited(
    handler: ModuleHandler,
    module: Any,
    scheme: Scheme,
    around: Surroundings,
    names: Sequence[str],
    config: FP8Config,
) -> tuple[Scheme, dict[str, Any], Why]:
    """The scheme that a module can have, the fields in which that is not the scheme asked for, and why.

    It is not selected where nothing is asked of it, or nothing is left.
    """
    if not handler.concerned(scheme):
        return scheme, {}, Why(Reason.NOT_ASKED_FOR)
    fields: dict[str, Any] = {}
    texts: list[str] = []
    for found, text in (limits_by_lists(handler, names, scheme, config), handler.limit(module, scheme, around)):
        fields |= found
        texts += [text] if text else []
    limits = {name: value for name, value in fields.items() if getattr(scheme, name) != value}
    scheme = replace(scheme, **limits)
    return scheme, limits, Why(Reason.SELECTED if handler.concerned(scheme) else Reason.UNFIT, "; ".join(texts))


def of_kinds_asked_for(
    found: Mapping[str, tuple[Any, ModuleHandler]], schemes: Mapping[str, Scheme]
) -> dict[str, tuple[Any, ModuleHandler]]:
    """The modules of kinds that the configuration asks anything of, be it of a single module."""
    kinds = {handler.kind for name, (_, handler) in found.items() if handler.concerned(schemes[name])}
    return {name: entry for name, entry in found.items() if entry[1].kind in kinds}


def all_names(model: nn.Module) -> dict[nn.Module, list[str]]:
    """Every name of every module: one that stands in two places has two."""
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    return names


def schemes_of(
    model: nn.Module, found: Mapping[str, tuple[Any, ModuleHandler]], config: FP8Config, *, calibrated: bool = True
) -> dict[str, Any]:
    """The scheme of each of the modules, by name."""
    names = config_names(model, found)
    return {
        name: scheme_for(config, names[name], type_names(module), calibrated=calibrated)
        for name, (module, _) in found.items()
    }


def config_names(model: nn.Module, found: Mapping[str, tuple[Any, ModuleHandler]]) -> dict[str, tuple[str, ...]]:
    """All names by which a configuration may mean each of the modules, by name, which comes first.

    A checkpoint may name modules as they are in its base model, or in the model around it: those names count too.
    """
    aliases, prefix = all_names(model), f"{getattr(model, 'base_model_prefix', '')}."
    return {
        name: tuple(alias for own in aliases.get(module, [name]) for alias in names_in_checkpoint(own, prefix))
        for name, (module, _) in found.items()
    }


def type_names(module: Any) -> tuple[str, ...]:
    """All names of a module's class, or of the class it stands for: "Linear", "torch.nn.Linear", the full path; of
    stacked experts of transformers "FusedMoE" as well, which is what lists made for other libraries call them."""
    cls = type(getattr(module, "origin", module))
    names = (cls.__name__, f"torch.nn.{cls.__name__}", f"{cls.__module__}.{cls.__qualname__}")
    return names if layout_of(module) is None else (*names, "FusedMoE")


def reschemed(
    model: nn.Module, decisions: Sequence[Decision], config: FP8Config, *, calibrated: bool
) -> list[Decision]:
    """The decisions with the schemes that hold once it is known whether there are ranges."""
    modules = dict(model.named_modules())
    found = {each.name: (modules[each.name], each.handler) for each in decisions}
    schemes = schemes_of(model, found, config, calibrated=calibrated)
    return [replace(each, scheme=replace(schemes[each.name], **each.limits)) for each in decisions]


def names_in_checkpoint(name: str, prefix: str) -> list[str]:
    """What a module may be called in a checkpoint, where `prefix` ("model.") is that of the base model."""
    return list(dict.fromkeys((name, name.removeprefix(prefix), f"{prefix}{name}" if len(prefix) > 1 else name)))


def _refuse_codes(decisions: list[Decision]) -> None:
    codes = [decision for decision in decisions if decision.why.reason is Reason.CODES]
    if codes:
        raise FP8SelectionError(
            f"{len(codes)} modules are quantized already, and their codes would be taken for values ({codes[0].name}: "
            f"{codes[0].reason}, expected bfloat16, float16 or float32): quantize the model in high precision, or put "
            "them on the blocklist"
        )


def _refuse_nothing(model: nn.Module, decisions: list[Decision]) -> None:
    if any(decision.selected for decision in decisions):
        return
    if not decisions:
        *types, last = sorted(
            kind for handler in handlers() if handler.family.replaced for kind in handler.spoken_types
        )
        known = f"{', '.join(types)} or {last}"
        raise FP8SelectionError(f"{type(model).__name__} has no {known}: there is nothing to quantize")
    shown = "; ".join(f"{decision.name}: {decision.reason}" for decision in decisions[:5])
    raise FP8SelectionError(
        f"none of the {len(decisions)} candidate modules is selected ({shown}): relax the lists of the config"
    )


def _warn_of_nothing_found(model: nn.Module, decisions: list[Decision], config: FP8Config) -> None:
    """Say so where the configuration asks for a family of modules that the model has none of."""
    scheme, there = scheme_for(config), {decision.handler.family.name for decision in decisions}
    asked = {handler.family.name: handler.family for handler in handlers() if handler.concerned(scheme)}
    for family in asked.values():
        if family.keys and family.name not in there and not config.lenient:
            logger.warning("%s has no %s that are known: %s do nothing", type(model).__name__, family.noun, family.keys)


def _skipped(model: nn.Module, config: FP8Config, found: Iterable[str]) -> dict[str, Why]:
    """The layers that stay in high precision by default, by name, and why."""
    ends = {} if config.quantize_lm_head else diffusion_ends(model) | measured_skips(model)
    heads = [] if config.quantize_lm_head else default_skips(model)
    precise = [name for name in found if any(matches_name(re.escape(key), name) for key in _precision_skips(model))]
    kept = dict.fromkeys([*heads, *precise], "")
    return {name: Why(Reason.KEPT, text) for name, text in (kept | ends).items()}


def matches_name(entry: str, name: str) -> bool:
    """Whether `modules_to_not_convert`'s `entry` means the module `name`: itself, what is inside, or a regex for it."""
    return f".{entry}." in f".{name}." or re.match(rf"(?:{entry})(?:\.|$)", name) is not None


def _precision_skips(model: nn.Module) -> list[str]:
    keep = getattr(model, "_keep_in_fp32_modules", None) or []
    strict = getattr(model, "_keep_in_fp32_modules_strict", None) or []
    return [*keep, *strict]


def _unfit_modules(model: nn.Module) -> dict[str, Why]:
    """Modules that would break the code around them in FP8, and why."""
    first = first_modules(model)
    unfit = dict.fromkeys(read_by_owner(model), "the code around it multiplies by its weight")
    adapters = _adapters(model)
    for name, module in model.named_modules():
        if module in first:
            unfit[name] = "its weight is the first of the model and tells the model's dtype"
        elif module in adapters:
            unfit[name] = "it belongs to an adapter"
    return {name: Why(Reason.UNFIT, text) for name, text in unfit.items()}


def _without_bypassed(model: nn.Module, decisions: list[Decision]) -> list[Decision]:
    """The decisions without layers that an nn.MultiheadAttention in high precision multiplies by and never calls."""
    selected = {decision.name for decision in decisions if decision.selected}
    owners = {name: each for name, each in model.named_modules() if isinstance(each, nn.MultiheadAttention)}
    bypassed = {id(each.out_proj) for name, each in owners.items() if name not in selected}
    names = [name for name in selected if id(model.get_submodule(name)) in bypassed]
    why = Why(Reason.UNFIT, "nn.MultiheadAttention reads its weight and never calls it")
    return leave_out(decisions, dict.fromkeys(names, why))


def _adapters(model: nn.Module) -> set[nn.Module]:
    """Modules of adapters (LoRA and its like), which are trained and merged: peft's layers name theirs, and diffusers'
    older layers have one `lora_layer`."""
    parts = [
        part
        for module in model.modules()
        for name in (*getattr(module, "adapter_layer_names", ()), "lora_layer")
        if isinstance(part := getattr(module, name, None), nn.Module)
    ]
    return {inner for part in parts for inner in part.modules()}


def _listed(names: list[str], module: nn.Module, config: FP8Config) -> Why | None:
    """The entry of the blocklist or of `modules_to_not_convert` that means a module with these names, or None."""
    for name in names:
        kind = next((kind for kind in config.blocklist["types"] if _is_type(module, kind)), None)
        if kind is not None:
            return Why(Reason.EXCLUDED, f"blocklist type {kind!r}")
        pattern = next((pattern for pattern in config.blocklist["names"] if re.search(pattern, name)), None)
        if pattern is not None:
            return Why(Reason.EXCLUDED, f"blocklist name {pattern!r}")
        entry = next((entry for entry in config.modules_to_not_convert or [] if matches_name(entry, name)), None)
        if entry is not None:
            return Why(Reason.EXCLUDED, f"modules_to_not_convert {entry!r}")
    return None


def _left_out(
    names: list[str], module: nn.Module, config: FP8Config, skipped: Mapping[str, Why], routing: set[nn.Module]
) -> Why | None:
    """Why the defaults, or an allowlist, leave out a layer with these names, or None."""
    if (kept := next((skipped[name] for name in names if name in skipped), None)) is not None:
        return kept
    if module in routing:
        return Why(Reason.ROUTES)
    return _not_allowed(names, module, config)


def _not_allowed(names: list[str], module: nn.Module, config: FP8Config) -> Why | None:
    """Why an allowlist leaves out a module with these names, or None."""
    allow = config.allowlist
    allowed = not (allow["names"] or allow["types"]) or any(_is_type(module, kind) for kind in allow["types"])
    if allowed or all(any(re.search(pattern, name) for pattern in allow["names"]) for name in names):
        return None
    return Why(Reason.NOT_ALLOWED)


def _is_type(module: nn.Module, kind: str) -> bool:
    """Whether `kind` names the module's class."""
    return kind in type_names(module)


def _check_patterns(model: nn.Module, config: FP8Config, found: Mapping[str, tuple[Any, ModuleHandler]]) -> None:
    names = [name for name, _ in model.named_modules(remove_duplicate=False) if name]
    if config.lenient:  # INC's names may be those of helper modules
        names += helper_names([name for name, (_, handler) in found.items() if handler.operations])
    modules = list(model.modules())
    known = {*INC_TYPES_NOT_THERE, *(kind for handler in handlers() for kind in handler.known_types)}
    known |= {f"torch.nn.{kind}" for kind in known}
    for key in ("allowlist", "blocklist"):
        entries = getattr(config, key)
        for pattern in entries["names"]:
            if not any(re.search(pattern, name) for name in names):
                _unmatched(f"{key} name {pattern!r} matches no module", pattern, names, config)
        for kind in entries["types"]:
            if kind not in known and not any(_is_type(module, kind) for module in modules):
                types = sorted({type(module).__name__ for module in modules})
                _unmatched(f"{key} type {kind!r} matches no module", kind, types, config)
    aliases = all_names(model)
    named = [(aliases[module], type_names(module)) for module, _ in found.values()]
    for place, pattern in config.unused_patterns(named):
        message = f"{place} {pattern!r} holds for no module that can be quantized"
        if "layer_types" not in place:
            _unmatched(message, pattern, [name for own, _ in named for name in own], config)
        elif pattern.removeprefix("torch.nn.") in known:  # INC's dicts name types that not every model has
            logger.warning("%s of this model", message)
        else:
            _unmatched(message, pattern, sorted({types[0] for _, types in named}), config)
    for entry in config.modules_to_not_convert or []:
        if not any(matches_name(entry, name) for name in names):
            _unmatched(f"modules_to_not_convert {entry!r} matches no module", entry, names, config)


def _unmatched(message: str, pattern: str, names: Iterable[str], config: FP8Config) -> None:
    if config.lenient:
        logger.warning("%s of this model", message)
        return
    parts = list(dict.fromkeys(part for name in names for part in name.split(".") if not part.isdigit()))
    raise FP8SelectionError(f"{message} of this model: correct or remove it ({nearest(pattern, parts)})")
