"""Whose attention implementation a model runs: what its user chose, and how models are told to run ours."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import transformers
from torch import nn

from ..modules.handler import Change
from .detect import Kind, attention_kind
from .function import NAME
from .own_path import own_paths
from .plan import plan_of

# What a user never gets without asking for it; "eager" and "sdpa" are what transformers chooses.
_DEFAULTS = (None, "eager", "sdpa", NAME)
_CHOICE = "_attn_implementation_internal"


def chosen_before_loading(config: Any) -> dict[str, str]:
    """The attention implementations a user asked for, by sub-configuration ("": the whole).

    Before a model is made, transformers has not filled in its own choice yet.
    """
    parts = {"": config} | {key: getattr(config, key, None) for key in getattr(config, "sub_configs", ())}
    found = {key: getattr(part, _CHOICE, None) for key, part in parts.items()}
    return {key: name for key, name in found.items() if name not in (None, NAME)}


def choices_by_config(model: nn.Module, chosen: Mapping[str, str]) -> dict[int, str]:
    """`chosen_before_loading`'s result by `id` of the configurations of a model's parts."""
    whole = chosen.get("")
    configs = [config for part in model.modules() if (config := getattr(part, "config", None)) is not None]
    choices = {id(config): whole for config in configs} if whole is not None else {}
    own = {id(getattr(model.config, key, None)): name for key, name in chosen.items() if key}
    return {**choices, **own}


def chosen_implementation(module: nn.Module, choices: Mapping[int, str]) -> str | None:
    """The attention implementation that a module's user chose, None where transformers did."""
    config = getattr(module, "config", None)
    if (choice := choices.get(id(config))) is not None:
        return choice
    name = getattr(config, "_attn_implementation", None)
    return None if name in _DEFAULTS else name


def running_implementation(module: nn.Module) -> str | None:
    """The attention implementation that a module looks up at its next call."""
    return getattr(getattr(module, "config", None), "_attn_implementation", None)


class OurImplementation(Change):
    """A configuration told to look up ours; one that its user has told otherwise since keeps that."""

    def undo(self) -> None:
        if getattr(self.owner, self.attribute, None) == NAME:
            super().undo()


def use_ours(model: nn.Module, others: Iterable[nn.Module]) -> list[Change]:
    """Let the models inside `model` that look up attention by name find ours, but for the modules `others`.

    Nor do modules that need their model's own, and what shares a configuration with them.
    """
    configs = {id(config): config for module in others if (config := getattr(module, "config", None)) is not None}
    configs |= dict.fromkeys(own_paths(model))
    changes: list[Change] = []
    for part in model.modules():
        config = getattr(part, "config", None)
        fits = isinstance(part, transformers.PreTrainedModel) and part._can_set_attn_implementation()
        if not fits and plan_of(part) is None or config is None or id(config) in configs:
            continue
        configs[id(config)] = config
        before = getattr(config, _CHOICE, None)
        if before != NAME and (fits or attention_kind(part) is not Kind.FUNCTIONS):
            changes.append(OurImplementation(config, _CHOICE, before))
            setattr(config, _CHOICE, NAME)
    return changes
