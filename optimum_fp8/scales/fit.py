"""Bringing a weight that is in FP8 already to another number format, with the least rounding.

A power of two moves between codes and scale: where FP8's exponent has room for it nothing is rounded, whatever the
format. What is rounded again is what becomes subnormal, and what saturates if no scale is large enough.
"""

from __future__ import annotations

from functools import cache

import torch

from .. import ops
from ..formats import MAX_EXPONENT, NumberFormat
from .granularity import PerTensor
from .rule import ScaleRule

_NEVER_ENDS = 64  # how often 0 can be halved
_ROWS = 256  # looked up at once: indices take four bytes each
_HARDWARE = "hardware"


def fit_weight(
    codes: torch.Tensor, scale: torch.Tensor, rule: ScaleRule, fmt: NumberFormat
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Codes and scale of a weight within a number format: as they are, where they fit.

    They do not where codes are above the full scale, or where the rule rounds to hardware scales and a scale is none.
    Of the scales that come into question (twice the scale; the hardware scales) the nearest is taken that rounds no
    weight again; if all do, the smallest at which none saturates; if some weight always does, the largest.

    Args:
        codes: `[out, in, …]`, FP8.
        scale: float32, of the rule's granularity or `(1,)`.
        rule: how the scale was found.
        fmt: the number format to fit.

    Returns:
        codes and scale, the very tensors where nothing changes; how many weights were rounded again.
    """
    values = codes.to(torch.bfloat16)  # exact
    granularity = PerTensor() if scale.numel() == 1 else rule.granularity
    largest = granularity.maxabs(values).reshape(scale.shape)
    options = _options(scale, rule, fmt)
    ratio = options / scale.double()[..., None]
    fits = largest[..., None] / ratio <= fmt.full_scale
    if bool((fits & (ratio == 1)).any(dim=-1).all()):
        return codes, scale, 0
    halvings = _NEVER_ENDS - granularity.maxabs(_NEVER_ENDS - _halvings(codes)).reshape(scale.shape)
    mantissa, exponent = torch.frexp(ratio)
    steps = exponent - 1
    exact = fits & (mantissa == 0.5) & (steps <= halvings[..., None])
    order = torch.where(exact, steps.abs(), torch.where(fits, 1000 + steps, 5000 - steps))
    best = order.argmin(dim=-1, keepdim=True)
    factor = ratio.gather(-1, best).squeeze(-1).clamp(max=2.0**MAX_EXPONENT).float()
    fitted = ops.cast_to_fp8(values, factor, fmt.dtype, fmt.full_scale).contiguous()
    rounded = torch.count_nonzero(ops.cast_from_fp8(fitted, factor, torch.bfloat16) != values)
    return fitted, options.expand_as(ratio).gather(-1, best).squeeze(-1).float(), int(rounded)


def always_fits(rule: ScaleRule, made_for: NumberFormat, fmt: NumberFormat) -> bool:
    """Whether weights made for one number format fit another, whatever they hold."""
    ours, theirs = fmt.hardware_scales, made_for.hardware_scales
    free = rule.rounding != _HARDWARE or (
        ours.min_exponent <= theirs.min_exponent
        and theirs.max_exponent <= ours.max_exponent
        and theirs.step % ours.step == 0
    )
    return made_for.full_scale <= fmt.full_scale and free


def _options(scale: torch.Tensor, rule: ScaleRule, fmt: NumberFormat) -> torch.Tensor:
    """The scales that come into question, float64 `[…, options]`."""
    if rule.rounding == _HARDWARE:
        return torch.tensor(fmt.hardware_scales.descending(), dtype=torch.float64, device=scale.device)
    return scale.double()[..., None] * torch.tensor([1.0, 2.0], dtype=torch.float64, device=scale.device)


def _halvings(codes: torch.Tensor) -> torch.Tensor:
    """How often each code can be halved before it is rounded: bfloat16, of the shape of the codes."""
    table = _halvings_of(codes.dtype).to(codes.device)
    return torch.cat([table[part.view(torch.uint8).int()] for part in codes.split(_ROWS)])


@cache
def _halvings_of(dtype: torch.dtype) -> torch.Tensor:
    """`_halvings` of every code there is, bfloat16 `[256]`."""
    values = torch.arange(256, dtype=torch.uint8, device="cpu").view(dtype).double().abs().nan_to_num(posinf=0)
    units = (values / values[1]).long()  # of the smallest subnormal
    halvings = torch.log2((units & -units).clamp(min=1).double())  # zeros behind the lowest bit
    return torch.where(units == 0, _NEVER_ENDS, halvings).to(torch.bfloat16)
