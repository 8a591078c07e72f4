"""Scale methods as data: how the scale of a weight and that of an activation follow from their ranges.

The names and numbers are those of Intel Neural Compressor. A method is a pair of rules; a rule says at which
granularity a scale is kept, where its value comes from, how it is rounded, and which part of FP8's full scale the
largest value may use (the backoff; activations keep more headroom than weights because calibration never sees all).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..errors import FP8ConfigError, nearest
from ..rounding import check_rounding
from .granularity import Granularity, PerChannel, PerTensor, PerToken
from .rule import DYNAMIC_BACKOFF, ScaleRule, value_of


@dataclass(frozen=True)
class ScaleMethod:
    """A named pair of rules.

    Attributes:
        name: what configurations and checkpoints call it.
        weight: how weights are scaled.
        activation: how activations are.
        dynamic_only: whether it scales tokens or groups by their own range, and is never calibrated.
        dynamic: the granularity of activations where they are scaled dynamically; None: that of `activation`.

    Raises:
        FP8ConfigError: a granularity that weights or activations do not have, or activations scaled by tokens or groups
            in a method that is not `dynamic_only`.
    """

    name: str
    weight: ScaleRule
    activation: ScaleRule
    dynamic_only: bool = False
    dynamic: Granularity | None = None

    @property
    def dynamic_activation(self) -> ScaleRule:
        """How activations are scaled by their own range, which takes no more headroom than a calibrated one."""
        if self.dynamic_only:
            return self.activation
        backoff = max(self.activation.backoff, DYNAMIC_BACKOFF)
        return replace(self.activation, granularity=self.dynamic or self.activation.granularity, backoff=backoff)

    def __post_init__(self) -> None:
        for what, granularity, fits in (
            ("weights", self.weight.granularity, self.weight.granularity.of_weights),
            ("activations", self.activation.granularity, self.activation.granularity.of_activations),
            ("activations", self.dynamic, self.dynamic is None or self.dynamic.of_activations),
        ):
            if not fits:
                raise FP8ConfigError(f"scale_method {self.name!r} scales {what} {granularity}, which {what} cannot be")
        if self.activation.granularity.group and not self.dynamic_only:
            raise FP8ConfigError(
                f"scale_method {self.name!r} scales activations {self.activation.granularity}: such scales follow from "
                "the very tensor and cannot be calibrated; say dynamic_only=True"
            )


_UNIT = ScaleRule(PerTensor(), "unit", "identity")
_FIRST_HARDWARE = ScaleRule(PerTensor(), "first_hardware", "hardware")

_WEIGHT = {
    "hw": ScaleRule(PerTensor(), "maxabs", "hardware", 0.5),
    "pow2": ScaleRule(PerTensor(), "maxabs", "pow2", 0.5),
    "arbitrary": ScaleRule(PerTensor(), "maxabs", "identity", 0.5),
    "opt_hw": ScaleRule(PerTensor(), "search", "hardware", 0.5),
    "opt_pow2": ScaleRule(PerTensor(), "search", "pow2", 0.5),
    "pcs_pow2": ScaleRule(PerChannel(), "maxabs", "pow2", 0.5),
    "pcs_opt_pow2": ScaleRule(PerChannel(), "search", "pow2", 0.5),
}
_ACTIVATION = {
    "hw": ScaleRule(PerTensor(), "maxabs", "hardware", 0.25),
    "pow2": ScaleRule(PerTensor(), "maxabs", "pow2", 0.25),
    "arbitrary": ScaleRule(PerTensor(), "maxabs", "identity", 0.25),
    "token_pow2": ScaleRule(PerToken(), "maxabs", "pow2", DYNAMIC_BACKOFF),
}

# INC has no dynamic scales with hardware rounding, and those it has with the others are per tensor, as their names say.
SCALE_METHODS: dict[str, ScaleMethod] = {
    method.name: method
    for method in (
        ScaleMethod("unit_scale", _UNIT, _UNIT),
        ScaleMethod("hw_aligned_single_scale", _FIRST_HARDWARE, _FIRST_HARDWARE),
        ScaleMethod("maxabs_hw", _WEIGHT["hw"], _ACTIVATION["hw"], dynamic=PerToken()),
        ScaleMethod("maxabs_pow2", _WEIGHT["pow2"], _ACTIVATION["pow2"]),
        ScaleMethod("maxabs_arbitrary", _WEIGHT["arbitrary"], _ACTIVATION["arbitrary"]),
        ScaleMethod("maxabs_hw_opt_weight", _WEIGHT["opt_hw"], _ACTIVATION["hw"], dynamic=PerToken()),
        ScaleMethod("maxabs_pow2_opt_weight", _WEIGHT["opt_pow2"], _ACTIVATION["pow2"]),
        ScaleMethod(
            "act_maxabs_hw_weights_pcs_maxabs_pow2", _WEIGHT["pcs_pow2"], _ACTIVATION["hw"], dynamic=PerToken()
        ),
        ScaleMethod(
            "act_maxabs_hw_weights_pcs_opt_pow2", _WEIGHT["pcs_opt_pow2"], _ACTIVATION["hw"], dynamic=PerToken()
        ),
        ScaleMethod("act_maxabs_pow2_weights_pcs_maxabs_pow2", _WEIGHT["pcs_pow2"], _ACTIVATION["pow2"]),
        ScaleMethod("act_maxabs_pow2_weights_pcs_opt_pow2", _WEIGHT["pcs_opt_pow2"], _ACTIVATION["pow2"]),
        ScaleMethod(
            "act_maxabs_pcs_pow2_weight_maxabs_pts_pow2_hw", _WEIGHT["hw"], _ACTIVATION["token_pow2"], dynamic_only=True
        ),
        ScaleMethod("maxabs_pcs_pow2", _WEIGHT["pcs_pow2"], _ACTIVATION["token_pow2"], dynamic_only=True),
    )
}

INC_METHODS = tuple(SCALE_METHODS)


def register_method(method: ScaleMethod) -> None:
    """Make a method known by its name, in lower case; one of the same name is replaced.

    Checkpoints name their method: it has to be registered, as it was, before they are loaded.

    Raises:
        FP8ConfigError: a value rule or a rounding that is not known, or a backoff out of range.
    """
    for rule in (method.weight, method.activation):
        value_of(rule)
        check_rounding(rule.rounding)
        rule.with_backoff(None)
    SCALE_METHODS[method.name.lower()] = method


def scale_method(name: str) -> ScaleMethod:
    """The method called `name` (any case).

    Raises:
        FP8ConfigError: there is no such method; the message names the nearest.
    """
    method = SCALE_METHODS.get(str(name).lower())
    if method is None:
        raise FP8ConfigError(
            f"scale_method={name!r} is unknown: {nearest(name, SCALE_METHODS)}; a method of your own has to be "
            "registered first"
        )
    return method
