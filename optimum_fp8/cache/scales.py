"""How one layer's keys and values are scaled when they are cached, as a value."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .. import ops
from ..errors import FP8ScaleError
from ..formats import NumberFormat
from ..ops.remembered import recall, remember
from ..scales import PerToken, ScaleRule, dynamic_scale, inf_as_nan, unsound

_SOUND = "optimum_fp8_sound"  # of a scale that was looked at
_POW2 = ScaleRule(PerToken(), "maxabs", "pow2", 0.5)


@dataclass(frozen=True)
class CacheScales:
    """Static scales of keys and values, or the rule by which each token of each head gets its own.

    Attributes:
        fmt: the number format of the codes.
        k: float32 `(1,)` or `(heads, 1, 1)`; None for dynamic scales.
        v: as `k`; keys and values are both static or both dynamic.
        rule: of dynamic scales; None is the power of two that maps a token's largest value to half the full scale.
        hp_dtype: the dtype in which dynamic scales are computed.

    Raises:
        FP8ScaleError: only one of `k` and `v`, or a shape or dtype that no cache has.
    """

    fmt: NumberFormat
    k: torch.Tensor | None = None
    v: torch.Tensor | None = None
    rule: ScaleRule | None = None
    hp_dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        if (self.k is None) != (self.v is None):
            raise FP8ScaleError(
                f"k is {self.k} and v is {self.v}: the scales of a cache are both static or both dynamic (None)"
            )
        for name, scale in (("k", self.k), ("v", self.v)):
            if scale is None:
                continue
            if scale.dtype != torch.float32 or not (scale.shape == (1,) or scale.shape[1:] == (1, 1)):
                raise FP8ScaleError(
                    f"{name} is {scale.dtype} {tuple(scale.shape)}: expected torch.float32 of shape (1,) for one scale "
                    "a tensor, or (heads, 1, 1) for one a head"
                )

    @property
    def is_dynamic(self) -> bool:
        return self.k is None

    def check(self, where: str) -> None:
        """Refuse scales that are not set, zero, negative, NaN or infinite.

        Each is looked at once, until it is written to: reading a value waits for the device, at each new cache.

        Raises:
            FP8ScaleError: names `where` they belong to.
        """
        for name, scale in (("k", self.k), ("v", self.v)):
            if scale is None or recall(scale, _SOUND):
                continue
            if wrong := unsound(scale):
                raise FP8ScaleError(
                    f"{where}: the {name} scale of its cache {wrong}; calibrate the model, or load a sound checkpoint"
                )
            remember(scale, _SOUND, True)

    def quantize(self, x: torch.Tensor, scale: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes and scale of new keys or values.

        Args:
            x: `[batch, heads, length, size]`.
            scale: `k` or `v`; None takes the scale of each token of each head from itself.

        Returns:
            codes of `x`'s shape in `fmt.dtype`, and the scale, or float32 `[batch, heads, length, 1]`.
        """
        if scale is None:
            scale, x = dynamic_scale(x, self.rule or _POW2, self.fmt, self.hp_dtype), inf_as_nan(x)
        return ops.cast_to_fp8(x, scale, self.fmt.dtype, self.fmt.full_scale), scale
