"""Which modules are quantized, and why each of the others is not."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import HfQuantizer

from .config import FP8Config
from .config_values import INC_TYPES_NOT_THERE
from .errors import FP8SelectionError, nearest
from .selection_readers import first_modules, read_by_owner

logger = logging.getLogger(__name__)

QUANTIZABLE = (nn.Linear, Conv1D, nn.Conv2d)
# Subclasses with a forward of their own that computes just what nn.Linear does.
_EQUIVALENT_TYPES = ("FalconLinear",)


@dataclass(frozen=True)
class Decision:
    """The fate of one module: `reason` says why it is not selected (or "selected")."""

    name: str
    type: str
    selected: bool
    reason: str


def candidates(model: nn.Module) -> dict[str, Any]:
    """All modules of a kind that could be quantized, by qualified name (a module in two places has its first name)."""
    return {name: module for name, module in model.named_modules() if isinstance(module, QUANTIZABLE)}


def select(model: nn.Module, config: FP8Config) -> list[Decision]:
    """Decide about every candidate module of `model`.

    Raises:
        FP8SelectionError: a pattern matches no module (a warning for INC's files), or nothing is left to quantize
            (where attention is to be quantized too, that may be all).
    """
    found = candidates(model)
    if "" in found:
        raise FP8SelectionError(f"a {type(model).__name__} cannot replace itself: wrap it, as nn.Sequential(layer)")
    _check_patterns(model, config)
    heads = [] if config.quantize_lm_head else default_skips(model)
    precise = [name for name in found if any(matches_name(re.escape(key), name) for key in _precision_skips(model))]
    skipped = {*heads, *precise}
    unfit = _unfit_modules(model)
    decisions = []
    aliases = _all_names(model)
    for name, module in found.items():
        exclusions = (_layer_exclusion(alias, module, config, skipped) for alias in aliases[module])
        reason = _refusal(module) or unfit.get(name) or next(filter(None, exclusions), None)
        decisions.append(Decision(name, type(module).__name__, reason is None, reason or "selected"))
    if not config.wants_attention:
        refuse_nothing(model, decisions)
    return decisions


def refuse_nothing(model: nn.Module, decisions: list[Decision]) -> None:
    """Refuse to go on with decisions that select nothing.

    Raises:
        FP8SelectionError: says why the first few were not selected.
    """
    if not any(decision.selected for decision in decisions):
        raise FP8SelectionError(_nothing_selected(model, decisions))


def _all_names(model: nn.Module) -> dict[nn.Module, list[str]]:
    """Every name of every module: one that stands in two places has two."""
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    return names


def default_skips(model: nn.Module) -> list[str]:
    """Names of transformers' defaults, for each of its models inside: output head, tied modules and last module."""
    skips: list[str] = []
    for prefix, part in _outermost_models(model):
        keys = [key.removesuffix(".bias") for key in HfQuantizer.get_modules_to_not_convert(part)]
        skips += [f"{prefix}.{key}" if prefix else key for key in keys]
    return skips


def _outermost_models(model: nn.Module) -> list[tuple[str, transformers.PreTrainedModel]]:
    """transformers models that are not part of another, by name."""
    found: list[tuple[str, transformers.PreTrainedModel]] = []
    for name, part in model.named_modules():
        inside = any(prefix == "" or name.startswith(f"{prefix}.") for prefix, _ in found)
        if isinstance(part, transformers.PreTrainedModel) and not inside:
            found.append((name, part))
    return found


def matches_name(entry: str, name: str) -> bool:
    """Whether `modules_to_not_convert`'s `entry` means the module `name`: itself, what is inside, or a regex for it."""
    return f".{entry}." in f".{name}." or re.match(rf"(?:{entry})(?:\.|$)", name) is not None


def _precision_skips(model: nn.Module) -> list[str]:
    keep = getattr(model, "_keep_in_fp32_modules", None) or []
    strict = getattr(model, "_keep_in_fp32_modules_strict", None) or []
    return [*keep, *strict]


def _unfit_modules(model: nn.Module) -> dict[str, str]:
    """Modules that would break the code around them in FP8, and why."""
    bypassed = {module.out_proj for module in model.modules() if isinstance(module, nn.MultiheadAttention)}
    first = first_modules(model)
    unfit = dict.fromkeys(read_by_owner(model), "the code around it reads its weight")
    for name, module in model.named_modules():
        if module in bypassed:
            unfit[name] = "nn.MultiheadAttention reads its weight and never calls it"
        elif module in first:
            unfit[name] = "its weight is the first of the model and tells the model's dtype"
    return unfit


def _refusal(module: Any) -> str | None:
    base = next(base for base in QUANTIZABLE if isinstance(module, base))
    if type(module).forward is not base.forward and type(module).__name__ not in _EQUIVALENT_TYPES:
        return f"{type(module).__name__} has a forward of its own"
    if "forward" in vars(module) and not hasattr(module, "_hf_hook"):
        return "its forward was replaced"
    if "weight" not in module._parameters or len(module._parameters) > 2:
        return "its weight is parametrized"
    weight = module.weight
    if not isinstance(weight, torch.Tensor) or not weight.is_floating_point() or weight.numel() == 0:
        return f"its weight is not a floating-point matrix ({tuple(weight.shape)}, {weight.dtype})"
    return None


def exclusion(name: str, module: nn.Module, config: FP8Config) -> str | None:
    """Why the blocklist or `modules_to_not_convert` keeps a module in high precision, or None."""
    kind = next((kind for kind in config.blocklist["types"] if _is_type(module, kind)), None)
    if kind is not None:
        return f"blocklist type {kind!r}"
    pattern = next((pattern for pattern in config.blocklist["names"] if re.search(pattern, name)), None)
    if pattern is not None:
        return f"blocklist name {pattern!r}"
    entry = next((entry for entry in config.modules_to_not_convert or [] if matches_name(entry, name)), None)
    return None if entry is None else f"modules_to_not_convert {entry!r}"


def _layer_exclusion(name: str, module: nn.Module, config: FP8Config, skipped: set[str]) -> str | None:
    reason = exclusion(name, module, config)
    if reason is not None:
        return reason
    if name in skipped:
        return "kept by default: head, tied or float32"
    allow = config.allowlist
    if not allow["names"] and not allow["types"]:
        return None
    allowed = any(_is_type(module, kind) for kind in allow["types"])
    allowed = allowed or any(re.search(pattern, name) for pattern in allow["names"])
    return None if allowed else "not in allowlist"


def _is_type(module: nn.Module, kind: str) -> bool:
    """Whether `kind` names the module's class: "Linear", "torch.nn.Linear" or the full path."""
    cls = type(module)
    return kind in (cls.__name__, f"{cls.__module__}.{cls.__qualname__}", f"torch.nn.{cls.__name__}")


def _check_patterns(model: nn.Module, config: FP8Config) -> None:
    names = [name for name, _ in model.named_modules(remove_duplicate=False) if name]
    modules = list(model.modules())
    known = {*INC_TYPES_NOT_THERE, *(kind.__name__ for kind in QUANTIZABLE), *_EQUIVALENT_TYPES}
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
    for entry in config.modules_to_not_convert or []:
        if not any(matches_name(entry, name) for name in names):
            _unmatched(f"modules_to_not_convert {entry!r} matches no module", entry, names, config)


def _unmatched(message: str, pattern: str, names: Iterable[str], config: FP8Config) -> None:
    if config.lenient:
        logger.warning("%s of this model", message)
        return
    parts = list(dict.fromkeys(part for name in names for part in name.split(".") if not part.isdigit()))
    raise FP8SelectionError(f"{message} of this model: correct or remove it ({nearest(pattern, parts)})")


def _nothing_selected(model: nn.Module, decisions: list[Decision]) -> str:
    if not decisions:
        return f"{type(model).__name__} has no Linear, Conv1D or Conv2d: there is nothing to quantize"
    shown = "; ".join(f"{decision.name}: {decision.reason}" for decision in decisions[:5])
    return f"none of the {len(decisions)} candidate modules is selected ({shown}): relax the lists of the config"
