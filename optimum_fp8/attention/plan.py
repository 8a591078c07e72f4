"""AttentionPlan: what attention does for one module, looked up at each call."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from .. import ops
from ..scales import Scheme

_PLAN = "_optimum_fp8_attention"


class AttentionPlan:
    """What attention does for one module.

    Attributes:
        scheme: how to round; None while measuring.
        observe: called with a kind ("q", "k", "v", "output", …) and the tensor while measuring, else None.
        observe_per_head: the same for a tensor `[batch, heads, length, size]`, where a module has to find out which is.
        rounds: whether attention is to be in FP8, after measuring or now, not the cache alone.
        record: the calls of the module's operators.
        name: of the module in its model, for messages.
    """

    def __init__(
        self,
        scheme: Scheme | None = None,
        observe: Callable[[str, torch.Tensor], None] | None = None,
        name: str = "",
        rounds: bool = True,
        observe_per_head: Callable[[str, torch.Tensor], None] | None = None,
    ):
        self.scheme, self.observe, self.record, self.name = scheme, observe, ops.CallRecord(), name
        self.observe_per_head = observe_per_head
        self.rounds = rounds if scheme is None else scheme.rounds_attention


def plan_of(module: nn.Module) -> AttentionPlan | None:
    """What attention does for `module`; None: compute in high precision."""
    return module.__dict__.get(_PLAN)


def set_plan(module: nn.Module, plan: AttentionPlan | None) -> None:
    """Let attention do something else for `module` from now on."""
    if plan is None:
        module.__dict__.pop(_PLAN, None)
    else:
        module.__dict__[_PLAN] = plan
