"""From ranges to scales: pure functions that know nothing of modules."""

from .activation import activation_divisor, activation_scale, fixed_scale
from .methods import SCALE_METHODS, ScaleMethod, ScaleRule, scale_method
from .weight import quantized_weight, weight_maxabs, weight_scale

__all__ = [
    "SCALE_METHODS",
    "ScaleMethod",
    "ScaleRule",
    "activation_divisor",
    "activation_scale",
    "fixed_scale",
    "quantized_weight",
    "scale_method",
    "weight_maxabs",
    "weight_scale",
]
