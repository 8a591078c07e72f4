"""What the checkpoints of an architecture call the weights of its experts, by the conversions of transformers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import transformers
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter

_known: WeakKeyDictionary[nn.Module, list[WeightConverter]] = WeakKeyDictionary()
_EACH = re.compile(r"\*\\?\.(\w+)\\?\.weight$")  # the end of a pattern for one weight of each expert


def parts_of_experts(model: nn.Module | None, name: str, stacks: Sequence[str]) -> tuple[str, ...]:
    """The names that the weights of one expert have in a checkpoint, as `("w1", "w3", "w2")`, the last one's down.

    Args:
        model: what the experts are in.
        name: of the experts in it.
        stacks: the names of the stacks, that of the down projections last.

    Returns:
        the names; none where checkpoints have stacks, or what is in them is arranged in another way.
    """
    if model is None or len(stacks) != 2:
        return ()
    above, below = (_sources(model, f"{name}.{stack}") for stack in stacks)
    if len(below) != 1 or len(above) != (2 if stacks[0] == "gate_up_proj" else 1):
        return ()
    return (*above, *below)


def _sources(model: nn.Module, key: str) -> list[str]:
    for each in _converters(model):
        targets = [re.sub(r"[\\^$]", "", target) for target in each.target_patterns]
        kinds = [type(operation) for operation in each.operations]
        plain = kinds in ([MergeModulelist], [MergeModulelist, Concatenate]) and each.operations[0].dim == 0  # type: ignore[attr-defined]
        if not plain or len(targets) != 1 or not key.endswith(targets[0]):
            continue
        if each.scope_prefix is None or each.scope_prefix in key:
            found = [_EACH.search(source) for source in each.source_patterns]
            return [match[1] for match in found if match] if all(found) else []
    return []


def _converters(model: nn.Module) -> list[WeightConverter]:
    if model not in _known:
        part: Any = next((each for each in model.modules() if isinstance(each, transformers.PreTrainedModel)), None)
        mapping = get_model_conversion_mapping(part, add_legacy=False) if part is not None else []
        _known[model] = [each for each in mapping if isinstance(each, WeightConverter)]
    return _known[model]
