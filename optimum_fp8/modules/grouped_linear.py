"""Linear layers of several groups, each of which multiplies its own part of the input (DeepSeek-V4)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .. import ops
from ..scales import Scheme
from .autocast import autocast
from .conv import LaterHandler
from .handler import Reason, Surroundings, Why, register_handler
from .linear import FP8LinearBase


class FP8GroupedLinear(FP8LinearBase):
    """`[…, groups, out / groups]` of an input `[…, groups, in]`, with an FP8 weight `[out, in]`."""

    n_groups: int

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scheme, x, size = self.scheme, autocast(x), self.out_features // self.n_groups
        x, input_scale = ops.scaled_input(x, self.scale_of(x))
        outputs = []
        for group in range(self.n_groups):
            rows = slice(group * size, (group + 1) * size)
            by_row = input_scale is not None and input_scale.ndim > 1
            outputs.append(
                ops.linear(
                    x[..., group, :],
                    self.codes[rows],
                    ops.scale_of_rows(self.weight_scale, rows, self.out_features),
                    input_scale[..., group, :] if input_scale is not None and by_row else input_scale,
                    None,
                    full_scale=scheme.fmt.full_scale,
                    arithmetic=scheme.arithmetic,
                    record=self.record,
                )
            )
        return torch.stack(outputs, dim=-2)


class GroupedLinearHandler(LaterHandler):
    """Layers of a class that is known by its name, and by its `n_groups`."""

    def __init__(self) -> None:
        super().__init__("grouped linear", (), FP8GroupedLinear)
        self.types = ("DeepseekV4GroupedLinear",)

    @property
    def spoken_types(self) -> tuple[str, ...]:
        return ()  # models that have none need not be told of them

    def base_of(self, module: Any) -> type[nn.Module] | None:
        known = isinstance(module, nn.Linear) and type(module).__name__ in self.types and hasattr(module, "n_groups")
        return type(module) if known else None

    def refusal(self, module: Any, scheme: Scheme, around: Surroundings) -> Why | None:
        granularity, size = scheme.weight.granularity, module.out_features // module.n_groups
        if size % getattr(granularity, "rows", 1):
            return Why(Reason.UNFIT, f"its groups end within a block: they have {size} rows, scales are {granularity}")
        if module.bias is not None:
            return Why(Reason.UNFIT, "it has a bias, which its forward does not add")
        return super().refusal(module, scheme, around)


register_handler(GroupedLinearHandler())
