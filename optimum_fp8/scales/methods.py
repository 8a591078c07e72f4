"""Scale methods as data: how the scale of a weight and that of an activation follow from their ranges.

The names and numbers are those of Intel Neural Compressor. A method is a pair of rules; a rule says at which
granularity a scale is kept, where its value comes from, how it is rounded, and which part of FP8's full scale the
largest value may use (the backoff; activations keep more headroom than weights because calibration never sees all).
"""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import FP8ConfigError, nearest

DYNAMIC_BACKOFF = 0.5  # a dynamic scale sees the very tensor it scales, so it needs less headroom


@dataclass(frozen=True)
class ScaleRule:
    """How one scale is found.

    Attributes:
        granularity: "tensor" (one scale), "channel" (one an output channel) or "token" (one a row of activations).
        value: "maxabs" (from the range), "search" (least squared error over candidates), "unit" (1.0) or
            "first_hardware" (the first of the target's hardware scales).
        rounding: "identity", "pow2" or "hardware".
        backoff: part of the full scale that the largest value is mapped to.
    """

    granularity: str
    value: str
    rounding: str
    backoff: float = 1.0

    @property
    def needs_range(self) -> bool:
        """Whether the value depends on the data at all."""
        return self.value in ("maxabs", "search")


@dataclass(frozen=True)
class ScaleMethod:
    """A named pair of rules; `dynamic_only` methods scale every token by its own range and cannot be calibrated."""

    name: str
    weight: ScaleRule
    activation: ScaleRule
    dynamic_only: bool = False


_UNIT = ScaleRule("tensor", "unit", "identity")
_FIRST_HARDWARE = ScaleRule("tensor", "first_hardware", "hardware")

_WEIGHT = {
    "hw": ScaleRule("tensor", "maxabs", "hardware", 0.5),
    "pow2": ScaleRule("tensor", "maxabs", "pow2", 0.5),
    "arbitrary": ScaleRule("tensor", "maxabs", "identity", 0.5),
    "opt_hw": ScaleRule("tensor", "search", "hardware", 0.5),
    "opt_pow2": ScaleRule("tensor", "search", "pow2", 0.5),
    "pcs_pow2": ScaleRule("channel", "maxabs", "pow2", 0.5),
    "pcs_opt_pow2": ScaleRule("channel", "search", "pow2", 0.5),
}
_ACTIVATION = {
    "hw": ScaleRule("tensor", "maxabs", "hardware", 0.25),
    "pow2": ScaleRule("tensor", "maxabs", "pow2", 0.25),
    "arbitrary": ScaleRule("tensor", "maxabs", "identity", 0.25),
    "token_pow2": ScaleRule("token", "maxabs", "pow2", DYNAMIC_BACKOFF),
}

SCALE_METHODS: dict[str, ScaleMethod] = {
    method.name: method
    for method in (
        ScaleMethod("unit_scale", _UNIT, _UNIT),
        ScaleMethod("hw_aligned_single_scale", _FIRST_HARDWARE, _FIRST_HARDWARE),
        ScaleMethod("maxabs_hw", _WEIGHT["hw"], _ACTIVATION["hw"]),
        ScaleMethod("maxabs_pow2", _WEIGHT["pow2"], _ACTIVATION["pow2"]),
        ScaleMethod("maxabs_arbitrary", _WEIGHT["arbitrary"], _ACTIVATION["arbitrary"]),
        ScaleMethod("maxabs_hw_opt_weight", _WEIGHT["opt_hw"], _ACTIVATION["hw"]),
        ScaleMethod("maxabs_pow2_opt_weight", _WEIGHT["opt_pow2"], _ACTIVATION["pow2"]),
        ScaleMethod("act_maxabs_hw_weights_pcs_maxabs_pow2", _WEIGHT["pcs_pow2"], _ACTIVATION["hw"]),
        ScaleMethod("act_maxabs_hw_weights_pcs_opt_pow2", _WEIGHT["pcs_opt_pow2"], _ACTIVATION["hw"]),
        ScaleMethod("act_maxabs_pow2_weights_pcs_maxabs_pow2", _WEIGHT["pcs_pow2"], _ACTIVATION["pow2"]),
        ScaleMethod("act_maxabs_pow2_weights_pcs_opt_pow2", _WEIGHT["pcs_opt_pow2"], _ACTIVATION["pow2"]),
        ScaleMethod(
            "act_maxabs_pcs_pow2_weight_maxabs_pts_pow2_hw", _WEIGHT["hw"], _ACTIVATION["token_pow2"], dynamic_only=True
        ),
        ScaleMethod("maxabs_pcs_pow2", _WEIGHT["pcs_pow2"], _ACTIVATION["token_pow2"], dynamic_only=True),
    )
}


def scale_method(name: str) -> ScaleMethod:
    """The method called `name` (any case).

    Raises:
        FP8ConfigError: there is no such method; the message names the nearest.
    """
    method = SCALE_METHODS.get(str(name).lower())
    if method is None:
        raise FP8ConfigError(f"scale_method={name!r} is unknown: {nearest(name, SCALE_METHODS)}")
    return method
