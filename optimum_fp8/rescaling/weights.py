"""Weights that are in FP8 already by another scheme: codes stay where they can, and what is rounded again is counted.

A weight was rounded once, and rounding it again adds error. So its scales are kept where the new rule allows them: for
each of finer parts that of the coarser, or one that is a power of two away, which moves the exponents of codes alone.
Else the weight is quantized anew by the rule, from the values that it has in FP8.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn

from .. import ops
from ..errors import FP8CheckpointError
from ..modules.weight import frozen
from ..ops.operands import broadcast_scale
from ..rounding import round_scale
from ..scales import Scheme, fit_weight, quantize_weight
from ..scales.weight import scale_shape

_HARDWARE = "hardware"
Weight = tuple[nn.Parameter, nn.Parameter]


@dataclass(frozen=True)
class Added:
    """What became of the weights of one module.

    Attributes:
        module: its name.
        weights: how many it has in FP8.
        rounded: how many of them have another value than before.
        error: ‖after - before‖ / ‖before‖ of all of them together.
    """

    module: str
    weights: int = 0
    rounded: int = 0
    error: float = 0.0


def rescaled(codes: torch.Tensor, scale: torch.Tensor, scheme: Scheme) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scale of a weight by another scheme.

    Args:
        codes: `[out, in, …]`, FP8.
        scale: float32, at any granularity.
        scheme: the new one.

    Returns:
        codes of its number format, and a scale of its granularity: the very tensors where nothing changes.
    """
    rule, fmt = scheme.weight, scheme.fmt
    if codes.dtype == fmt.dtype and rule.needs_range:
        kept = _kept(codes, scale, scheme)
        if kept is not None and (rule.rounding == _HARDWARE or _is_allowed(kept, scheme)):
            fitted, new_scale, _ = fit_weight(codes, kept, rule, fmt)
            return fitted, new_scale
    made, new_scale, _ = quantize_weight(ops.cast_from_fp8(codes, scale, torch.float32), rule, fmt, scheme.hp_dtype)
    return made, new_scale


def _kept(codes: torch.Tensor, scale: torch.Tensor, scheme: Scheme) -> torch.Tensor | None:
    """The scale that weights have, at the granularity of the scheme; None where it is coarser than they have it."""
    shape = scale_shape(codes.shape, scheme.weight)
    if tuple(scale.shape) == shape:
        return scale
    if scale.numel() == 1:
        return scale.reshape(-1).expand(math.prod(shape)).reshape(shape).contiguous()
    each = broadcast_scale(scale, codes).expand(codes.shape).contiguous()
    coarse = scheme.weight.granularity.maxabs(each).reshape(shape)
    same = torch.equal(broadcast_scale(coarse, codes).expand(codes.shape), each)
    return coarse if same else None


def _is_allowed(scale: torch.Tensor, scheme: Scheme) -> bool:
    """Whether the rule of a scheme could have given a scale: some raw one is rounded to it."""
    found = (round_scale(raw, scheme.weight.rounding, scheme.fmt) == scale for raw in (scale, 0.75 * scale))
    return any(bool(each.all()) for each in found)


class Rescaled:
    """The weights of one module after the other by new schemes; each once, so that tied weights stay tied.

    Attributes:
        rows: what became of those of each module.
    """

    def __init__(self) -> None:
        self.rows: list[Added] = []
        self._known: dict[tuple[int, Scheme], Weight] = {}
        self._kept: list[nn.Parameter] = []  # or another weight might get the id of one that is gone
        self._squares = torch.zeros(2, dtype=torch.float64)

    def start(self, module: str) -> None:
        """The weights that follow are of this module."""
        self.rows.append(Added(module))
        self._squares = torch.zeros(2, dtype=torch.float64)

    def __call__(self, codes: nn.Parameter, scale: nn.Parameter, scheme: Scheme) -> Weight:
        key = id(codes), scheme
        if key not in self._known:
            if codes.is_meta:
                raise FP8CheckpointError(f"{self.rows[-1].module} is offloaded: there are no codes to scale anew")
            made, new_scale = rescaled(codes, scale, scheme)
            after = (codes, scale) if made is codes and new_scale is scale else (frozen(made), frozen(new_scale))
            self._known[key] = after
            self._kept.append(codes)
        self._count(codes, scale, *self._known[key])
        return self._known[key]

    def _count(self, codes: torch.Tensor, scale: torch.Tensor, made: torch.Tensor, new_scale: torch.Tensor) -> None:
        row, rounded = self.rows[-1], 0
        before = ops.cast_from_fp8(codes, scale, torch.float32)
        difference = ops.cast_from_fp8(made, new_scale, torch.float32) - before
        # Products of codes and scales that are no powers of two are rounded in float32, which is no change.
        rounded = int(torch.count_nonzero(difference.abs() > before.abs() * 2.0**-20))
        self._squares += torch.stack([difference.double().square().sum(), before.double().square().sum()]).cpu()
        of, all_of = self._squares.tolist()
        error = (of / all_of) ** 0.5 if rounded or row.rounded else 0.0
        self.rows[-1] = Added(row.module, row.weights + codes.numel(), row.rounded + rounded, error if all_of else 0.0)
