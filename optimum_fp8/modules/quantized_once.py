"""Quantizing each weight of a model once, so that tied weights stay tied."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from .. import ops
from ..scales import Scheme, quantize_weight
from .weight import frozen


def codes_and_scale(
    weight: torch.Tensor, scheme: Scheme, scale: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight `[out, in, …]` in FP8: contiguous codes of its shape, and the float32 scale.

    Args:
        weight: in high precision.
        scheme: how it is scaled.
        scale: the scale to keep; None: it follows from the weight.

    Raises:
        FP8ScaleError: the weight holds NaN or Inf, or nothing at all.
    """
    if scale is not None:
        return ops.cast_to_fp8(weight, scale, scheme.fmt.dtype, scheme.fmt.full_scale).contiguous(), scale
    return quantize_weight(weight, scheme.weight, scheme.fmt, scheme.hp_dtype)[:2]


class QuantizedOnce:
    """Codes and scale of each weight, as parameters that tied weights share.

    Args:
        scales: those of weights that are to keep the scales they have.
    """

    def __init__(self, scales: Mapping[nn.Parameter, torch.Tensor] | None = None) -> None:
        self._scales = {id(parameter): scale for parameter, scale in (scales or {}).items()}
        self._known: dict[tuple[Any, ...], tuple[nn.Parameter, nn.Parameter]] = {}
        self._seen: list[nn.Parameter] = [*(scales or ())]  # what is gone would leave its `id` to others

    def __call__(
        self, parameter: nn.Parameter, weight: torch.Tensor, scheme: Scheme
    ) -> tuple[nn.Parameter, nn.Parameter]:
        """Codes and scale of `weight`, which is what `parameter` holds with output channels first."""
        key = (id(parameter), scheme.weight, scheme.fmt, scheme.hp_dtype)
        if key not in self._known:
            codes, scale = codes_and_scale(weight, scheme, self._scales.get(id(parameter)))
            self._known[key] = (frozen(codes), frozen(scale))
            self._seen.append(parameter)
        return self._known[key]
