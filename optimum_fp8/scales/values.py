"""The value rules there are: from the range, by a search, fixed."""

from __future__ import annotations

import torch

from ..errors import FP8ConfigError
from ..formats import MAX_EXPONENT, MIN_EXPONENT, NumberFormat
from ..rounding import round_scale, scale_from_maxabs
from .granularity import PerChannel, PerTensor
from .rule import ScaleRule, ScaleValue, register_value
from .search import search_channel_scales, search_tensor_scale


class MaxAbs(ScaleValue):
    """From the range: max|x| / (full scale · backoff), rounded."""

    def of_weight(
        self, weight: torch.Tensor, maxabs: torch.Tensor, rule: ScaleRule, fmt: NumberFormat, hp_dtype: torch.dtype
    ) -> torch.Tensor:
        if isinstance(rule.granularity, PerTensor):
            return scale_from_maxabs(maxabs, rule.divisor(fmt), rule.rounding, fmt, hp_dtype, reciprocal=fmt.is_gaudi)
        return round_scale(_raw_scale(maxabs, rule.divisor(fmt)), rule.rounding, fmt)

    def of_range(self, ranges: torch.Tensor, rule: ScaleRule, fmt: NumberFormat, hp_dtype: torch.dtype) -> torch.Tensor:
        reciprocal = fmt.is_gaudi and rule.granularity.group == 0
        return scale_from_maxabs(ranges, rule.divisor(fmt), rule.rounding, fmt, hp_dtype, reciprocal=reciprocal)


class Search(MaxAbs):
    """Of weights the scale with the least squared error over candidates; of activations as from the range."""

    only_range = False

    def of_weight(
        self, weight: torch.Tensor, maxabs: torch.Tensor, rule: ScaleRule, fmt: NumberFormat, hp_dtype: torch.dtype
    ) -> torch.Tensor:
        if isinstance(rule.granularity, PerTensor):
            return search_tensor_scale(weight, rule.rounding, fmt, hp_dtype)
        if not isinstance(rule.granularity, PerChannel):
            raise FP8ConfigError(f"a search {rule.granularity}: expected per tensor or per channel")
        reference = round_scale(_raw_scale(maxabs, rule.divisor(fmt)), "pow2", fmt)
        return search_channel_scales(weight, reference, fmt).clamp(2.0**MIN_EXPONENT, 2.0**MAX_EXPONENT)


class Unit(ScaleValue):
    """1.0, whatever the data."""

    needs_range = only_range = False

    def value(self, fmt: NumberFormat) -> float:
        """The one value."""
        return 1.0

    def of_weight(
        self, weight: torch.Tensor, maxabs: torch.Tensor, rule: ScaleRule, fmt: NumberFormat, hp_dtype: torch.dtype
    ) -> torch.Tensor:
        return torch.full((1,), self.value(fmt), dtype=torch.float32, device=weight.device)

    def of_range(self, ranges: torch.Tensor, rule: ScaleRule, fmt: NumberFormat, hp_dtype: torch.dtype) -> torch.Tensor:
        return torch.full(ranges.shape, self.value(fmt), dtype=torch.float32, device=ranges.device)


class FirstHardware(Unit):
    """The first of the target's hardware scales.

    Off Gaudi there is no table whose first scale could be taken: there the single scale is 1.0, which the hardware
    applies for free and which E4M3's range around 1 suits best.
    """

    def value(self, fmt: NumberFormat) -> float:
        return fmt.hardware_scales.descending()[0] if fmt.is_gaudi else 1.0


register_value("maxabs", MaxAbs())
register_value("search", Search())
register_value("unit", Unit())
register_value("first_hardware", FirstHardware())


def _raw_scale(maxabs: torch.Tensor, divisor: float) -> torch.Tensor:
    """Scales of parts of a weight keep the plain division, and give a part of zeros the smallest scale, as INC does."""
    return (maxabs / divisor).clamp(min=2.0**MIN_EXPONENT)
