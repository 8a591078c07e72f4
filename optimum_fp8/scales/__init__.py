"""From ranges to scales: pure functions that know nothing of modules, and the values that say how one is scaled."""

from importlib import import_module
from pkgutil import iter_modules

from ..ops import inf_as_nan
from .activation import activation_scale, dynamic_scale, scale_of_range
from .check import is_sound, unsound
from .fit import always_fits, fit_weight
from .granularity import Granularity, PerBlock, PerChannel, PerGroup, PerHead, PerTensor, PerToken
from .methods import INC_METHODS, SCALE_METHODS, ScaleMethod, register_method, scale_method
from .rule import VALUES, ScaleRule, ScaleValue, register_value
from .scheme import DYNAMIC, STATIC, WEIGHT_ONLY, Scheme
from .weight import quantize_weight, quantized_weight, scale_of_weight, scale_shape, weight_maxabs, weight_scale

for _file in iter_modules(__path__):  # each registers what it defines
    import_module(f".{_file.name}", __name__)

__all__ = [
    "DYNAMIC",
    "INC_METHODS",
    "SCALE_METHODS",
    "STATIC",
    "VALUES",
    "WEIGHT_ONLY",
    "Granularity",
    "PerBlock",
    "PerChannel",
    "PerGroup",
    "PerHead",
    "PerTensor",
    "PerToken",
    "ScaleMethod",
    "ScaleRule",
    "ScaleValue",
    "Scheme",
    "activation_scale",
    "always_fits",
    "dynamic_scale",
    "fit_weight",
    "inf_as_nan",
    "is_sound",
    "quantize_weight",
    "quantized_weight",
    "register_method",
    "register_value",
    "scale_method",
    "scale_of_range",
    "scale_of_weight",
    "scale_shape",
    "unsound",
    "weight_maxabs",
    "weight_scale",
]
