"""ScaleRule: how one scale is found, as a value; and the value rules that it names."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

import torch

from ..errors import FP8ConfigError, FP8ScaleError, nearest
from ..formats import NumberFormat
from ..ops.operands import BLOCK, GROUPS
from .check import unsound
from .granularity import Granularity

DYNAMIC_BACKOFF = 0.5  # a dynamic scale sees the very tensor it scales, so it needs less headroom


@dataclass(frozen=True)
class ScaleRule:
    """How one scale is found.

    Attributes:
        granularity: which values share a scale.
        value: a name from `VALUES`: "maxabs" (from the range), "search" (least squared error over candidates),
            "unit" (1.0), "first_hardware" (the first of the target's hardware scales), or one registered besides.
        rounding: a name from `rounding.ROUNDINGS`: "identity", "pow2", "hardware", or one registered besides.
        backoff: part of the full scale that the largest value is mapped to.

    Raises:
        FP8ConfigError: blocks or groups of sizes that operators do not know, and would take for others.
    """

    granularity: Granularity
    value: str
    rounding: str
    backoff: float = 1.0

    def __post_init__(self) -> None:
        if not self.granularity.fits_operators:
            raise FP8ConfigError(
                f"a scale {self.granularity} is not what operators take: expected blocks of {BLOCK}×{BLOCK}, or groups "
                f"of {' or '.join(map(str, GROUPS))} values"
            )

    @property
    def needs_range(self) -> bool:
        """Whether the value depends on the data at all."""
        return value_of(self).needs_range

    def with_backoff(self, backoff: float | None) -> ScaleRule:
        """The rule with another backoff; None leaves the rule's.

        Raises:
            FP8ConfigError: the backoff is not above 0 and at most 1.
        """
        chosen = self.backoff if backoff is None else backoff
        if not 0.0 < chosen <= 1.0:
            raise FP8ConfigError(f"backoff={chosen} is out of range: expected 0 < backoff <= 1")
        return self if chosen == self.backoff else replace(self, backoff=chosen)

    def divisor(self, fmt: NumberFormat) -> float:
        """The FP8 value that the largest value is mapped to: full scale times backoff."""
        return fmt.full_scale * self.backoff

    def __str__(self) -> str:
        value = self.value if self.rounding == "identity" else f"{self.value} {self.rounding}"
        return f"{self.granularity} {value}" + (f" ×{self.backoff:g}" if self.needs_range and self.backoff != 1 else "")


class ScaleValue(ABC):
    """How the value of a scale is found; a new one is a subclass and a call of `register_value`.

    Attributes:
        needs_range: whether it depends on the data; without, static activations need no calibration.
        only_range: whether nothing but the range decides, so that scales may be looked up by it.
    """

    needs_range = True
    only_range = True

    @abstractmethod
    def of_weight(
        self, weight: torch.Tensor, maxabs: torch.Tensor, rule: ScaleRule, fmt: NumberFormat, hp_dtype: torch.dtype
    ) -> torch.Tensor:
        """The scale of a weight.

        Args:
            weight: `[out, in, …]`, bfloat16 or float32.
            maxabs: its range at the rule's granularity, in the weight's dtype.
            rule: the rule this value belongs to.
            fmt: the number format.
            hp_dtype: of arithmetic per tensor.

        Returns:
            float32, of the shape of `maxabs` or `(1,)`.
        """

    @abstractmethod
    def of_range(self, ranges: torch.Tensor, rule: ScaleRule, fmt: NumberFormat, hp_dtype: torch.dtype) -> torch.Tensor:
        """The scales of activations, float32 of the shape of `ranges`: calibrated ranges, finite and not negative."""


VALUES: dict[str, ScaleValue] = {}


def checked_scale(scale: torch.Tensor, shape: tuple[int, ...], rule: ScaleRule) -> torch.Tensor:
    """A scale that a value rule gave, if it is one: float32, of the shape of the ranges, finite and above 0.

    Raises:
        FP8ScaleError: names the rule, what it gave and what is expected.
    """
    given = f"the value rule {rule.value!r} gave"
    if not isinstance(scale, torch.Tensor) or scale.dtype != torch.float32:
        found = scale.dtype if isinstance(scale, torch.Tensor) else type(scale).__name__
        raise FP8ScaleError(f"{given} a scale in {found}: expected a tensor in torch.float32")
    if tuple(scale.shape) not in (shape, (1,)):
        raise FP8ScaleError(f"{given} a scale of shape {tuple(scale.shape)} {rule.granularity}: expected {shape}")
    if wrong := unsound(scale):
        raise FP8ScaleError(f"{given} a scale that {wrong}")
    return scale


def register_value(name: str, value: ScaleValue) -> None:
    """Make a value rule known by `name`, for `ScaleRule.value`; one of the same name is replaced."""
    VALUES[name] = value


def value_of(rule: ScaleRule) -> ScaleValue:
    """The value rule that a scale rule names.

    Raises:
        FP8ConfigError: there is none of that name; the message names the nearest.
    """
    found = VALUES.get(rule.value)
    if found is None:
        raise FP8ConfigError(f"the value rule {rule.value!r} of a scale is unknown: {nearest(rule.value, VALUES)}")
    return found
