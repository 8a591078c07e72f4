"""How many tokens went to each expert of a module that holds the stacked weights of many, whichever way it is called.

Experts that are modules of their own (a `ModuleList` of MLPs) need none of this: what goes into their layers is counted
there.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from ..errors import FP8MeasurementError
from .observer import Observer, Statistic
from .padding import Padding

EXPERTS = "experts"  # the kind under which the counts stand in measurements files


class ExpertTokens(Observer):
    """Tokens that went to each expert of one module.

    Statistics:
        tokens: int64 `(experts,)`.
    """

    name = "expert_tokens"
    STATISTICS = {"tokens": Statistic(torch.add, shape=(None,))}

    def update(self, x: torch.Tensor) -> None:
        self.accumulate(tokens=x)

    def range(self) -> torch.Tensor:
        raise FP8MeasurementError("experts: tokens were counted, no range was measured: leave these out")

    def tokens(self) -> torch.Tensor:
        """int64 `(experts,)`."""
        return self._statistics["tokens"]


def number_of_experts(module: nn.Module) -> int | None:
    """How many experts' weights a module holds in stacks, by itself or in parts without layers; None: it has none."""
    declared = getattr(module, "num_experts", None)
    layers = any(isinstance(part, nn.Linear) for part in module.modules())
    return _stacked(module) or (declared if type(declared) is int and not layers else None)


def _stacked(module: nn.Module) -> int | None:
    """How many weights the stacks of a module hold; the least, as experts that compute nothing may lack some."""
    if hasattr(module, "kernel_size"):  # the weight of a convolution over one dimension, be it in FP8
        return None
    stacks = [parameter.shape[0] for parameter in module.parameters(recurse=False) if parameter.ndim == 3]
    return min(stacks, default=None)


def tokens_of_experts(module: nn.Module, values: Iterable[Any], padding: Padding) -> torch.Tensor | None:
    """How many tokens a call sends to each of a module's experts, int64 `(experts,)`; None: it is no such call.

    Args:
        module: of which `number_of_experts` is known.
        values: what it is called with. Known are indices of experts beside their weights (`[tokens, k]` each), how many
            of the rows, which are sorted by expert, belong to each (a list of sizes; rows of padding among them count
            as well), and all tokens once for each expert, zeros where they do not go there (`[experts · tokens,
            size]`).
        padding: which tokens are padding, and do not count.
    """
    experts = number_of_experts(module)
    values = [value for value in values if value is not None]
    if experts is None or not values or not isinstance(values[0], torch.Tensor):
        return None
    indices = [value for value in values[1:] if _is_indices(value)]
    if len(indices) == 1 and any(_weighs(value, indices[0], experts) for value in values[1:]):
        return _counted(padding.rows_of(indices[0]), experts)
    for value in values[1:]:
        if isinstance(value, (list, tuple)) and len(value) == experts and all(type(size) is int for size in value):
            return torch.tensor(value, dtype=torch.int64, device=values[0].device)
    sorted_rows = len(values) == 1 and getattr(module, "num_experts", None) == _stacked(module)
    if sorted_rows and values[0].ndim == 2 and values[0].shape[0] % experts == 0:
        sent = values[0].reshape(experts, -1, values[0].shape[-1]).any(dim=-1)
        return padding.rows_of(sent.mT).sum(dim=0)
    return None


def _is_indices(value: Any) -> bool:
    whole = isinstance(value, torch.Tensor) and not value.is_floating_point() and not value.is_complex()
    return whole and value.dtype != torch.bool and value.ndim >= 2


def _weighs(value: Any, indices: torch.Tensor, experts: int) -> bool:
    """Whether a tensor can be the weights of the experts that `indices` choose, or those of all experts."""
    if not isinstance(value, torch.Tensor) or not value.is_floating_point() or value.ndim != indices.ndim:
        return False
    return value.shape[:-1] == indices.shape[:-1] and value.shape[-1] in (indices.shape[-1], experts)


def _counted(indices: torch.Tensor, experts: int) -> torch.Tensor:
    """How often each index occurs; others than those of experts (tokens that are dropped, say) do not count."""
    known = (indices >= 0) & (indices < experts)
    slots = torch.where(known, indices, experts).flatten().long()
    counts = torch.zeros(experts + 1, dtype=torch.int64, device=indices.device)
    return counts.scatter_add_(0, slots, torch.ones_like(slots))[:experts]
